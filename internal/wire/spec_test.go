package wire

import (
	"strings"
	"testing"
)

func TestFilesSpecCheck(t *testing.T) {
	file := func(path, mode string) []FileSpec { return []FileSpec{{Path: path, Mode: mode}} }
	for _, c := range []struct {
		name string
		spec FilesSpec
		want string // part of the error; empty: valid
	}{
		{"plain", FilesSpec{Files: file("/etc/motd", "0644"), Reload: []string{"true"}}, ""},
		{"default mode", FilesSpec{Files: file("/etc/motd", "")}, ""},
		{"no files", FilesSpec{}, "files: at least one"},
		{"relative", FilesSpec{Files: file("etc/motd", "")}, "files[0].path"},
		{"dots", FilesSpec{Files: file("/etc/../motd", "")}, "files[0].path"},
		{"root", FilesSpec{Files: file("/", "")}, "files[0].path"},
		{"setuid", FilesSpec{Files: file("/bin/x", "4755")}, "files[0].mode"},
		{"not octal", FilesSpec{Files: file("/bin/x", "rw-r--r--")}, "files[0].mode"},
		{"twice", FilesSpec{Files: append(file("/a", ""), FileSpec{Path: "/a"})}, "twice"},
		{"empty validate", FilesSpec{Files: file("/a", ""), Validate: []string{}}, "validate"},
	} {
		err := c.spec.Check()
		if (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.name, err, c.want)
		}
	}
}

func TestCheckSpecValidate(t *testing.T) {
	if err := (CheckSpec{Command: []string{"/bin/true"}, Interval: MinCheckInterval}).Validate(); err != nil {
		t.Error(err)
	}
	for _, s := range []CheckSpec{{}, {Command: []string{""}}, {Command: []string{"/bin/true"}, Interval: 1}, {Command: []string{"a\x00b"}}} {
		if err := s.Validate(); err == nil {
			t.Errorf("%+v is valid", s)
		}
	}
}
