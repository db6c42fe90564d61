package cli

import (
	"bufio"
	"errors"
	"fmt"
	"strings"
)

// Confirm asks before a change of more than one thing. With yes it does not
// ask; without a terminal there is nobody to ask, and it refuses.
func Confirm(streams IO, yes bool, format string, args ...any) error {
	question := fmt.Sprintf(format, args...)
	if yes {
		return nil
	}
	_, inTTY := terminal(streams.In)
	_, errTTY := terminal(streams.Err)
	if !inTTY || !errTTY {
		return Fail(ExitRefused, "%s: nobody is there to ask; add --yes", question)
	}
	_, _ = fmt.Fprintf(streams.Err, "%s. Go on? [y/N] ", question)
	line, err := bufio.NewReader(streams.In).ReadString('\n')
	if errors.Is(err, errSignal) {
		_, _ = fmt.Fprintln(streams.Err)
	}
	if err != nil && line == "" {
		return Fail(ExitRefused, "not confirmed")
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return Fail(ExitRefused, "not confirmed")
}
