package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"
)

const (
	// minPassphrase is a floor, not advice: what it protects is a CA.
	minPassphrase = 12
	maxPassphrase = 4 << 10
)

// Passphrase reads a passphrase from the first line of a file, or asks the
// person at the terminal; twice when it is a new one. variable is where the
// file's name may stand too.
func Passphrase(streams IO, file, variable string, fresh bool) ([]byte, error) {
	if file != "" {
		return passphraseFile(file)
	}
	fd, ok := terminal(streams.In)
	if !ok {
		return nil, Usage("a passphrase is needed and nobody is there to ask: name a file that holds it with --passphrase-file or %s", variable)
	}
	text, err := ask(streams, fd, "Passphrase: ")
	if err != nil {
		return nil, err
	}
	if fresh {
		again, err := ask(streams, fd, "Once more: ")
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(text, again) {
			return nil, Usage("the two are not the same")
		}
	}
	return text, checkPassphrase(text)
}

// ask reads a line that the terminal does not show. A signal leaves the terminal
// as it was, too.
func ask(streams IO, fd int, prompt string) ([]byte, error) {
	before, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	_, _ = fmt.Fprint(streams.Err, prompt)
	read := func() ([]byte, error) { return term.ReadPassword(fd) }
	var b []byte
	if in, ok := streams.In.(*input); ok {
		b, err = await(in, read)
	} else {
		b, err = read()
	}
	if errors.Is(err, errSignal) {
		err = errors.Join(err, term.Restore(fd, before))
	}
	_, _ = fmt.Fprintln(streams.Err)
	return b, err
}

func passphraseFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	line, rest, _ := bytes.Cut(b, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(b) > maxPassphrase || len(bytes.TrimSpace(rest)) > 0 {
		return nil, Usage("%s holds more than one line", name)
	}
	if err := checkPassphrase(line); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return line, nil
}

func checkPassphrase(b []byte) error {
	if len(b) < minPassphrase {
		return &usageError{errors.New("a passphrase has at least 12 characters; `head -c 24 /dev/urandom | base64` makes a good one")}
	}
	return nil
}
