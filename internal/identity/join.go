package identity

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sallyport/internal/wire"
)

// maxJoinFile is more than any join code takes.
const maxJoinFile = 16 << 10

// maxJoinFiles bounds a directory of join codes.
const maxJoinFiles = 256

// JoinSource is the value of a *_JOIN variable: a join code, a file, a
// directory with one file per gateway, or "-" for standard input. Files are
// read anew by each Codes, so that a replaced one is picked up.
type JoinSource struct {
	value string
	stdin string // what "-" gave; it can be read once
	kept  string // file of Keep; empty: none
}

// Join is one code and the place it was read from, for messages.
type Join struct {
	Code   wire.JoinCode
	Source string // "environment", "standard input" or a file name
}

// OpenJoin takes the value of a *_JOIN variable; empty is a source without
// codes. Of stdin, at most 16 KiB are read, only for "-".
func OpenJoin(value string, stdin io.Reader) (*JoinSource, error) {
	s := &JoinSource{value: value}
	if value == "-" {
		b, err := readJoin(stdin)
		if err != nil {
			return nil, fmt.Errorf("join code from standard input: %w", err)
		}
		s.stdin = b
	}
	return s, nil
}

// KeptJoin is the file of [JoinSource.KeepIn] in a role's directory.
const KeptJoin = "join"

// KeepIn adds a file beside the configured value: where [JoinSource.Keep] puts
// a code that an operator hands over while the role runs.
func (s *JoinSource) KeepIn(path string) { s.kept = path }

// Keep stores a join code in the file of KeepIn, replacing the one before. The
// next Codes returns it first.
func (s *JoinSource) Keep(code string) error {
	if _, err := wire.ParseJoinCode(code); err != nil {
		return err
	}
	if s.kept == "" {
		return errors.New("join code: there is no place to keep it")
	}
	if err := writeFile(filepath.Dir(s.kept), filepath.Base(s.kept), []byte(strings.TrimSpace(code)+"\n"), 0o600); err != nil {
		return fmt.Errorf("join code: %w", unreadable(err))
	}
	return nil
}

func (s *JoinSource) String() string {
	if s == nil || s.value == "" {
		return "none"
	}
	if strings.HasPrefix(s.value, wire.JoinPrefix) {
		return "environment" // the value itself is a secret
	}
	return s.value
}

// Absent says why the place that was configured holds no code now; empty if
// none was configured, or it holds one.
func (s *JoinSource) Absent() string {
	if s == nil || s.value == "" {
		return ""
	}
	if joins, err := s.configured(); err != nil || len(joins) > 0 {
		return ""
	}
	st, err := os.Stat(s.value)
	switch {
	case err != nil:
		return s.value + " does not exist"
	case st.IsDir():
		return "there is no join code in the directory " + s.value
	}
	return s.value + " is empty"
}

// Codes reads what is there now. A missing file or directory, or an empty
// file, gives no codes and no error: an enrolled party does not need it any more. A malformed code
// is an error that wraps wire.ErrJoinCode; the good ones are returned with it.
func (s *JoinSource) Codes() ([]Join, error) {
	if s == nil {
		return nil, nil
	}
	if s.kept == "" {
		return s.configured()
	}
	kept, err := joinFile(s.kept)
	joins, err2 := s.configured()
	return append(kept, joins...), errors.Join(err, err2)
}

func (s *JoinSource) configured() ([]Join, error) {
	switch {
	case s.value == "":
		return nil, nil
	case strings.HasPrefix(s.value, wire.JoinPrefix):
		return one("environment", s.value)
	case s.value == "-":
		return one("standard input", s.stdin)
	}
	st, err := os.Stat(s.value)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("join code: %w", unreadableCode(err))
	}
	if !st.IsDir() {
		return joinFile(s.value)
	}
	entries, err := os.ReadDir(s.value)
	if err != nil {
		return nil, fmt.Errorf("join codes: %w", unreadableCode(err))
	}
	var joins []Join
	var errs []error
	for n, e := range entries {
		if n == maxJoinFiles {
			errs = append(errs, fmt.Errorf("join codes: %s holds more than %d files", s.value, maxJoinFiles))
			break
		}
		if strings.HasPrefix(e.Name(), ".") || e.IsDir() { // ..data of a mounted secret
			continue
		}
		j, err := joinFile(filepath.Join(s.value, e.Name()))
		joins = append(joins, j...)
		errs = append(errs, err)
	}
	return joins, errors.Join(errs...)
}

// unreadableCode adds what to do to a join code's file that is refused: it is not
// in SALLYPORT_DATA, and not ours to own.
func unreadableCode(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (let the user that this runs as read it: uid %d)", err, os.Geteuid())
	}
	return err
}

func joinFile(path string) ([]Join, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it went between the listing and now
	}
	if err != nil {
		return nil, fmt.Errorf("join code: %w", unreadableCode(err))
	}
	defer func() { _ = f.Close() }()
	b, err := readJoin(f)
	if err != nil {
		return nil, fmt.Errorf("join code: %s: %w", path, err)
	}
	if strings.TrimSpace(b) == "" {
		return nil, nil // somebody is about to fill it
	}
	return one(path, b)
}

func one(source, text string) ([]Join, error) {
	c, err := wire.ParseJoinCode(text)
	if err != nil {
		return nil, fmt.Errorf("join code from %s: %w", source, err)
	}
	return []Join{{Code: c, Source: source}}, nil
}

func readJoin(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJoinFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > maxJoinFile {
		return "", fmt.Errorf("%w: more than %d bytes", wire.ErrJoinCode, maxJoinFile)
	}
	return string(b), nil
}
