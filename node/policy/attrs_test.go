package policy

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"sallyport/internal/wire"
)

// What a policy replaced comes back as it was: also its setuid bit, its ACL and
// what else stands in its extended attributes. The policy's own file has none
// of that.
func TestWhatWasReplacedComesBackWhole(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(h.etc, "tool")
	if err := os.WriteFile(file, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(file, 4711, 4712); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Chmod(file, 0o6755); err != nil {
		t.Fatal(err)
	}
	attrs := map[string]string{
		"user.sallyport": "a\x00b",
		// linux/posix_acl_xattr.h: version 2; user::rwx user:1::r-x group::r-x mask::r-x other::r-x
		"system.posix_acl_access": "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\x01\x00\x00\x00" +
			"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff",
		// linux/capability.h: version 2, cap_net_raw permitted and effective
		"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}
	for name, v := range attrs {
		if err := unix.Setxattr(file, name, []byte(v), 0); errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) {
			delete(attrs, name)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	look := func() (st unix.Stat_t, have map[string]string) {
		t.Helper()
		if err := unix.Lstat(file, &st); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		list, err := readAttrs(int(f.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		have = map[string]string{}
		for name, v := range list {
			have[name] = string(v)
		}
		return st, have
	}
	before, _ := look()
	spec := wire.FilesSpec{Files: []wire.FileSpec{{Path: file, Content: "policy", Mode: "0755"}}}
	if st := h.apply(doc{"p", wire.PolicyFiles, spec})["p"]; st.State != wire.PolicyApplied {
		t.Fatalf("%+v", st)
	}
	st, have := look()
	if st.Mode&modeBits != 0o755 || st.Uid != before.Uid || st.Gid != before.Gid {
		t.Errorf("the policy's file has mode %o and owner %d:%d", st.Mode, st.Uid, st.Gid)
	}
	for name := range attrs {
		if _, ok := have[name]; ok {
			t.Errorf("the policy's file has %s", name)
		}
	}
	h.open() // what was saved is on disk
	h.apply()
	st, have = look()
	if b, err := os.ReadFile(file); err != nil || string(b) != "before" || st.Mode != before.Mode || st.Uid != before.Uid || st.Gid != before.Gid {
		t.Errorf("restored as %q with mode %o and owner %d:%d, want %o and %d:%d; %v", b, st.Mode, st.Uid, st.Gid, before.Mode, before.Uid, before.Gid, err)
	}
	for name, v := range attrs {
		if have[name] != v {
			t.Errorf("%s is %q, want %q", name, have[name], v)
		}
	}
	t.Logf("with %d extended attributes", len(attrs))
}

// The label that a service needs to read a file stays with its place.
func TestSuccessorKeepsOwnerAndLabel(t *testing.T) {
	s := snapshot{Kind: kindFile, Mode: 0o600, Content: []byte("x")}
	s.succeed(snapshot{Mode: 0o4755, UID: 1, GID: 2, Attrs: map[string][]byte{attrLabel: []byte("etc_t"), "security.capability": []byte("c")}})
	if s.Mode != 0o600 || s.UID != 1 || s.GID != 2 || len(s.Attrs) != 1 || string(s.Attrs[attrLabel]) != "etc_t" {
		t.Fatalf("%+v", s)
	}
}
