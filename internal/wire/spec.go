package wire

import (
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"
)

// SpecError says which key of a spec no node could do anything with.
type SpecError struct {
	Field  string // as in files[0].path
	Reason string
}

func (e *SpecError) Error() string { return e.Field + ": " + e.Reason }

func specError(field, format string, args ...any) error {
	return &SpecError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// Types of policies that have a spec here.
const (
	PolicyFiles = "files"
	PolicyCheck = "check"
)

// Limits of a check.
const (
	MinCheckInterval     = Duration(time.Second)
	DefaultCheckInterval = Duration(time.Minute)
	DefaultCheckTimeout  = Duration(30 * time.Second)
)

// CheckSpec is the spec of a policy of type check: a program that keeps the
// Nagios plugin contract, run every Interval.
type CheckSpec struct {
	Command  []string `json:"command"`            // program and arguments; no shell
	Interval Duration `json:"interval,omitempty"` // DefaultCheckInterval if 0
	Timeout  Duration `json:"timeout,omitempty"`  // DefaultCheckTimeout if 0
}

// Validate refuses what no node could run.
func (s CheckSpec) Validate() error {
	if err := validCommand("command", s.Command); err != nil {
		return err
	}
	if s.Interval != 0 && s.Interval < MinCheckInterval {
		return specError("interval", "%v is shorter than %v", s.Interval, MinCheckInterval)
	}
	return nil
}

// FilesSpec is the spec of a policy of type files: all of them are replaced
// atomically, or none.
type FilesSpec struct {
	Files    []FileSpec `json:"files"`
	Validate []string   `json:"validate,omitempty"` // program and arguments, run before the files count as applied
	Reload   []string   `json:"reload,omitempty"`   // program and arguments, run after a change
}

// FileSpec is one file. Mode is octal text; 0644 if empty.
type FileSpec struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode,omitempty"`
}

// DefaultFileMode is the mode of a file whose spec names none.
const DefaultFileMode = 0o644

// Perm parses Mode. Set-id and sticky bits are refused: a files policy brings
// configuration, not privileges.
func (f FileSpec) Perm() (uint32, error) {
	if f.Mode == "" {
		return DefaultFileMode, nil
	}
	m, err := strconv.ParseUint(strings.TrimPrefix(f.Mode, "0o"), 8, 32)
	if err != nil || m > 0o777 {
		return 0, fmt.Errorf("%q is not a file mode (octal, at most 0777)", Quotable(f.Mode))
	}
	return uint32(m), nil
}

// Check refuses what no node could apply. (The name Validate is taken by the
// spec's own key.)
func (s FilesSpec) Check() error {
	if len(s.Files) == 0 {
		return specError("files", "at least one file is needed")
	}
	seen := make(map[string]bool, len(s.Files))
	for i, f := range s.Files {
		field := fmt.Sprintf("files[%d].", i)
		switch {
		case !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/":
			return specError(field+"path", "%q is not an absolute, clean path of a file", Quotable(f.Path))
		case strings.ContainsRune(f.Path, 0):
			return specError(field+"path", "it contains a NUL byte")
		case seen[f.Path]:
			return specError(field+"path", "%q stands there twice", Quotable(f.Path))
		}
		seen[f.Path] = true
		if _, err := f.Perm(); err != nil {
			return specError(field+"mode", "%v", err)
		}
	}
	if s.Validate != nil {
		if err := validCommand("validate", s.Validate); err != nil {
			return err
		}
	}
	if s.Reload != nil {
		return validCommand("reload", s.Reload)
	}
	return nil
}

// validCommand accepts a program with or without a path: the node resolves it
// and matches the resolved path against its allow variables.
func validCommand(key string, command []string) error {
	if len(command) == 0 || command[0] == "" {
		return specError(key, "a program is needed")
	}
	for i, a := range command {
		if strings.ContainsRune(a, 0) {
			return specError(fmt.Sprintf("%s[%d]", key, i), "it contains a NUL byte")
		}
	}
	return nil
}
