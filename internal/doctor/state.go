package doctor

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"sallyport/internal/local"
	"sallyport/internal/wire"
)

// sqliteHeader is the beginning of a database of SQLite that tells how long the
// file has to be (https://sqlite.org/fileformat.html, 1.3).
const sqliteHeader = 100

// kept is a file that a role keeps beside its identity and does not start
// without reading, or a pattern of such files, and what to do when it is
// corrupt.
type kept struct{ name, fix string }

var keptBy = map[wire.Role][]kept{
	wire.RoleRCP: {{"reigns.json", "delete it: gateways bring its content again"}},
	wire.RoleNode: {
		{"desired.json", "delete it: the gateway brings it again, and what was applied stays"},
		{"state.json", "delete it: what it says is found out again"},
		{"rcps.json", "delete it: the addresses of the join code hold until the gateway sends its list again"},
		{"actions/*/action.json", "delete it: if the action has not ended, its result stays unknown"},
		{"actions/*/result.json", "delete it: if the gateway has not had it yet, the result stays unknown"},
		{"policies/applied.json", "delete it: policies are applied again, but what they replaced before is not put back when they go"},
	},
}

// State examines what a role keeps in dir beside its identity. Only what is
// corrupt is a finding: a file that is missing was perhaps never written.
func State(dir string, role wire.Role) (checks []local.Check) {
	for _, k := range keptBy[role] {
		names, err := fs.Glob(os.DirFS(dir), k.name)
		if err != nil {
			continue
		}
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(name)))
			if err == nil && !json.Valid(b) {
				checks = append(checks, local.Check{Check: "state", Detail: name + " in " + dir + " is corrupt", Fix: "stop the " + string(role) + " and " + k.fix})
			}
		}
	}
	return checks
}

// Database examines the database of a gateway that does not run and whose
// identity is in dir. What lies in its write-ahead log is not looked at.
func Database(file, dir string) []local.Check {
	const fix = "restore it from a backup (`sallyport restore FILE`)"
	bad := func(detail, fix string) []local.Check {
		return []local.Check{{Check: "database", Detail: file + " " + detail, Fix: fix}}
	}
	head, size, err := headOf(file)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && size == 0:
		if _, err := os.Stat(filepath.Join(dir, "chain.pem")); err != nil {
			return nil // nothing was ever here
		}
		return bad("is missing or empty, and this gateway was in use: started so it begins a new installation, and its nodes stay locked",
			fix+", or set SALLYPORT_GATEWAY_DATABASE to where it is")
	case err != nil:
		return bad("cannot be read: "+err.Error(), "run as the user that owns it, or as root")
	case !bytes.HasPrefix(head, []byte("SQLite format 3\x00")):
		return bad("is corrupt: it is no database", fix)
	}
	page := int64(binary.BigEndian.Uint16(head[16:]))
	if page == 1 {
		page = 64 << 10
	}
	if pages := int64(binary.BigEndian.Uint32(head[28:])); bytes.Equal(head[24:28], head[92:96]) && size < page*pages {
		return bad(fmt.Sprintf("is corrupt: it was cut off at %d of %d bytes", size, page*pages), fix)
	}
	return []local.Check{{Check: "database", OK: true, Detail: file + " is there"}}
}

func headOf(file string) (head []byte, size int64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	head = make([]byte, sqliteHeader)
	if _, err := io.ReadFull(f, head); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, 0, err
	}
	return head, st.Size(), nil
}
