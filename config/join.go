package config

import "strings"

// joinPrefix begins every join code; any other value names where to find one.
const joinPrefix = "sp1."

// Join says where join codes are: the code itself, a file, a directory of
// files (one per gateway), or "-" for standard input. Codes are secrets. Nothing
// is read here: a file may come later, and be replaced while the role runs.
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
