package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// joinPrefix begins every join code; any other value names where to find one.
const joinPrefix = "sp1."

// maxJoinFile bounds what is read from one file: a code is below 8 KiB.
const maxJoinFile = 64 << 10

// Join says where join codes are: the code itself, a file, a directory of
// files (one per gateway), or "-" for standard input. Codes are secrets.
type Join struct {
	code Secret
	path string
}

// UnmarshalText never fails: what does not begin like a code is a path.
func (j *Join) UnmarshalText(b []byte) error {
	s := strings.TrimSpace(string(b))
	if strings.HasPrefix(s, joinPrefix) {
		*j = Join{code: Secret(s)}
		return nil
	}
	*j = Join{path: s}
	return nil
}

// MarshalText shows a path, and hides a code.
func (j Join) MarshalText() ([]byte, error) { return []byte(j.String()), nil }

// String shows a path, and hides a code.
func (j Join) String() string {
	if j.code != "" {
		return j.code.String()
	}
	return j.path
}

// Reveal returns the value as it was set, a code included: for
// identity.OpenJoin, which reads the codes.
func (j Join) Reveal() string {
	if j.code != "" {
		return j.code.Reveal()
	}
	return j.path
}

// IsZero reports whether no join code was configured.
func (j Join) IsZero() bool { return j == Join{} }

// Path returns the file or directory; empty for a code and for standard input.
func (j Join) Path() string {
	if j.path == "-" {
		return ""
	}
	return j.path
}

// Code is one join code as text, with where it was found.
type Code struct {
	Text Secret
	From string // for messages: a path, "the environment" or "standard input"
}

// Codes reads the codes anew: a replaced file must be picked up without a
// restart. A file or directory that does not exist gives an error that is
// fs.ErrNotExist, which a party that is enrolled already ignores. stdin is
// read for "-" only, once.
func (j Join) Codes(stdin io.Reader) ([]Code, error) {
	switch {
	case j.IsZero():
		return nil, nil
	case j.code != "":
		return []Code{{j.code, "the environment"}}, nil
	case j.path == "-":
		return readCode(stdin, "standard input")
	}
	info, err := os.Stat(j.path)
	if err != nil {
		return nil, fmt.Errorf("read join code: %w", err)
	}
	if !info.IsDir() {
		return readCodeFile(j.path)
	}
	entries, err := os.ReadDir(j.path)
	if err != nil {
		return nil, fmt.Errorf("read join codes: %w", err)
	}
	var all []Code
	var errs []error
	for _, e := range entries {
		// Editors and Kubernetes volumes leave hidden files and directories behind.
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		name := filepath.Join(j.path, e.Name())
		if info, err := os.Stat(name); err == nil && info.IsDir() {
			continue
		}
		codes, err := readCodeFile(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, codes...)
	}
	return slices.Clip(all), errors.Join(errs...)
}

func readCodeFile(name string) ([]Code, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read join code: %w", err)
	}
	defer func() { _ = f.Close() }()
	return readCode(f, name)
}

func readCode(r io.Reader, from string) ([]Code, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJoinFile+1))
	if err != nil {
		return nil, fmt.Errorf("read join code from %s: %w", from, err)
	}
	if len(b) > maxJoinFile {
		return nil, fmt.Errorf("read join code from %s: longer than %d bytes, so it is no join code", from, maxJoinFile)
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return nil, fmt.Errorf("read join code from %s: it is empty; put the line there that `sallyport join create` printed", from)
	}
	return []Code{{Secret(text), from}}, nil
}
