package wire

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// Revision orders the desired states of one node. The generation rises when a
// gateway's database is restored, so that a restored gateway never reuses a
// number that a node has already seen.
type Revision struct {
	Generation int64
	N          int64
}

// Compare orders by generation, then by n.
func (r Revision) Compare(o Revision) int {
	return cmp.Or(cmp.Compare(r.Generation, o.Generation), cmp.Compare(r.N, o.N))
}

// IsZero reports whether no desired state was ever made.
func (r Revision) IsZero() bool { return r == Revision{} }

// String returns "<generation>.<n>".
func (r Revision) String() string {
	return strconv.FormatInt(r.Generation, 10) + "." + strconv.FormatInt(r.N, 10)
}

// ParseRevision is the inverse of [Revision.String].
func ParseRevision(s string) (Revision, error) {
	gs, ns, ok := strings.Cut(s, ".")
	g, err1 := strconv.ParseInt(gs, 10, 64)
	n, err2 := strconv.ParseInt(ns, 10, 64)
	r := Revision{Generation: g, N: n}
	if !ok || err1 != nil || err2 != nil || g < 0 || n < 0 || r.String() != s {
		return Revision{}, fmt.Errorf("%q is not a revision (<generation>.<n>)", Quotable(s))
	}
	return r, nil
}

// MarshalText writes the form of [Revision.String].
func (r Revision) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads the form of [Revision.String].
func (r *Revision) UnmarshalText(b []byte) (err error) {
	*r, err = ParseRevision(string(b))
	return err
}
