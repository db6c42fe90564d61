package identity_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

func TestKeptJoinCodeComesFirst(t *testing.T) {
	code := func(td string) string {
		s, err := (wire.JoinCode{TrustDomain: td, Root: wire.HashSPKI(nil), Role: wire.RoleRCP}).Encode()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s, err := identity.OpenJoin(code("configured"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Keep(code("lost")); err == nil {
		t.Error("a code was kept nowhere")
	}
	path := filepath.Join(t.TempDir(), "join")
	s.KeepIn(path)
	if joins, err := s.Codes(); err != nil || len(joins) != 1 {
		t.Fatalf("before: %v, %v", joins, err)
	}
	if err := s.Keep("sp1.garbage"); !errors.Is(err, wire.ErrJoinCode) {
		t.Errorf("garbage: %v", err)
	}
	if err := s.Keep(code("handed")); err != nil {
		t.Fatal(err)
	}
	joins, err := s.Codes()
	if err != nil || len(joins) != 2 || joins[0].Code.TrustDomain != "handed" || joins[0].Source != path {
		t.Fatalf("after: %+v, %v", joins, err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: a code is a secret", st.Mode(), err)
	}
}
