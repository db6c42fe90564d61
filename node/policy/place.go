package policy

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sallyport/node/proc"
)

// ErrBounds says that the node's configuration forbids a path.
var ErrBounds = errors.New("refused by the node's configuration")

// maxSaved is the largest file that a policy may replace: it is saved first.
const maxSaved = 64 << 20

// Bounds is where files policies may write.
type Bounds struct {
	Allow     proc.Allow // SALLYPORT_NODE_ALLOW_PATHS
	Forbidden []string   // SALLYPORT_DATA
}

// always are trees that no setting opens.
var always = []string{"/proc", "/sys", "/dev"}

// Resolve checks a clean absolute path and returns where it really lies. Both
// the path as it is written and the real one must be allowed, so that no
// symbolic link leads out.
func (b Bounds) Resolve(name string) (string, error) {
	real, err := realPath(name)
	if err != nil {
		return "", err
	}
	for _, p := range []string{name, real} {
		for _, tree := range always {
			if within(p, tree) {
				return "", fmt.Errorf("%w: %s lies in %s", ErrBounds, name, tree)
			}
		}
		for _, tree := range b.Forbidden {
			if within(p, tree) {
				return "", fmt.Errorf("%w: %s lies in the agent's own data directory", ErrBounds, name)
			}
		}
		if !b.Allow.Matches(p) {
			return "", fmt.Errorf("%w: %s (%s) is not in SALLYPORT_NODE_ALLOW_PATHS", ErrBounds, name, p)
		}
	}
	return real, nil
}

func within(p, tree string) bool {
	return p == tree || strings.HasPrefix(p, strings.TrimSuffix(tree, "/")+"/")
}

// realPath resolves the directories of name as far as they exist. The last
// element is never followed: a link there is replaced, not written through.
func realPath(name string) (string, error) {
	dir, rest := path.Dir(name), path.Base(name)
	for {
		real, err := filepath.EvalSymlinks(dir)
		if err == nil {
			return path.Join(real, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || dir == "/" {
			return "", err
		}
		if _, lerr := os.Lstat(dir); lerr == nil {
			return "", fmt.Errorf("%s is a symbolic link that leads nowhere", dir)
		}
		dir, rest = path.Dir(dir), path.Join(path.Base(dir), rest)
	}
}

// place is a name in an open directory that was reached without following any
// symbolic link: nobody can exchange the way to it afterwards.
type place struct {
	fd      int
	name    string
	path    string
	created []string // directories made on the way, outermost first
}

// openPlace opens the directory of a resolved path; create makes missing ones.
func openPlace(resolved string, create bool) (*place, error) {
	p := &place{name: path.Base(resolved), path: resolved}
	fd, err := unix.Open("/", unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_RDONLY, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	at := ""
	for _, elem := range strings.Split(strings.Trim(path.Dir(resolved), "/"), "/") {
		if elem == "" {
			continue
		}
		at += "/" + elem
		next, err := openDirAt(fd, elem)
		if errors.Is(err, unix.ENOENT) && create {
			if err = unix.Mkdirat(fd, elem, 0o755); err == nil {
				p.created = append(p.created, at)
				if err = unix.Fsync(fd); err == nil {
					next, err = openDirAt(fd, elem)
				}
			}
		}
		_ = unix.Close(fd)
		if err != nil {
			return p, &fs.PathError{Op: "open directory", Path: at, Err: err}
		}
		fd = next
	}
	p.fd = fd
	return p, nil
}

func openDirAt(fd int, name string) (int, error) {
	return unix.Openat(fd, name, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_RDONLY, 0)
}

func (p *place) close() { _ = unix.Close(p.fd) }

func (p *place) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: p.path, Err: err}
}

// Kinds of a snapshot.
const (
	kindAbsent = "absent"
	kindFile   = "file"
	kindLink   = "link"
)

// snapshot is what stands at a path. It is saved before a policy replaces it.
type snapshot struct {
	Path    string   `json:"path"` // resolved
	Kind    string   `json:"kind"`
	Mode    uint32   `json:"mode,omitempty"` // with setuid, setgid and sticky
	UID     int      `json:"uid,omitempty"`
	GID     int      `json:"gid,omitempty"`
	Content []byte   `json:"content,omitempty"`
	Target  string   `json:"target,omitempty"`  // of a link
	Created []string `json:"created,omitempty"` // directories that a policy made for it
	// Extended attributes by name: ACLs, capabilities, the SELinux label.
	Attrs map[string][]byte `json:"attrs,omitempty"`
}

// modeBits are the bits of st_mode that chmod sets.
const modeBits = 0o7777

// succeed makes s, which has content and mode alone, the successor of the file
// that it replaces: it has its owner and its SELinux label. ACLs and
// capabilities were given to the other content, and its mode is a policy's.
func (s *snapshot) succeed(before snapshot) {
	s.UID, s.GID = before.UID, before.GID
	if label, ok := before.Attrs[attrLabel]; ok {
		s.Attrs = map[string][]byte{attrLabel: label}
	}
}

// same reports whether two snapshots of one path say the same; the owner does
// not count.
func (s snapshot) same(o snapshot) bool {
	return s.Kind == o.Kind && s.Mode == o.Mode && s.Target == o.Target && string(s.Content) == string(o.Content)
}

// take reads what stands at p.
func (p *place) take() (snapshot, error) {
	s := snapshot{Path: p.path, Kind: kindAbsent}
	var st unix.Stat_t
	err := unix.Fstatat(p.fd, p.name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return s, nil
	}
	if err != nil {
		return s, p.fail("stat", err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		s.Kind, s.UID, s.GID = kindLink, int(st.Uid), int(st.Gid)
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(p.fd, p.name, b)
		if err != nil {
			return s, p.fail("read link", err)
		}
		s.Target = string(b[:n])
		return s, nil
	case unix.S_IFREG:
	default:
		return s, p.fail("replace", errors.New("it is neither a file nor a link"))
	}
	fd, err := unix.Openat(p.fd, p.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return s, p.fail("open", err)
	}
	f := os.NewFile(uintptr(fd), p.path)
	defer func() { _ = f.Close() }()
	// All that follows is of the file that is open: the name may mean another by now.
	if err := unix.Fstat(fd, &st); err != nil {
		return s, p.fail("stat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return s, p.fail("save", errors.New("it just changed its kind"))
	}
	s.Kind, s.Mode, s.UID, s.GID = kindFile, st.Mode&modeBits, int(st.Uid), int(st.Gid)
	if s.Attrs, err = readAttrs(fd); err != nil {
		return s, p.fail("read the extended attributes of", err)
	}
	if s.Content, err = io.ReadAll(io.LimitReader(f, maxSaved+1)); err != nil {
		return s, err
	}
	if len(s.Content) > maxSaved {
		return s, p.fail("save", fmt.Errorf("it is larger than the %d MiB that can be saved", maxSaved>>20))
	}
	return s, nil
}

// put makes p as s says, atomically, and durable.
func (p *place) put(s snapshot) error {
	if s.Kind == kindAbsent {
		if err := unix.Unlinkat(p.fd, p.name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return p.fail("remove", err)
		}
		return p.sync()
	}
	temp := ".sallyport-" + rand.Text()
	if err := p.make(temp, s); err != nil {
		_ = unix.Unlinkat(p.fd, temp, 0)
		return err
	}
	if err := unix.Renameat(p.fd, temp, p.fd, p.name); err != nil {
		_ = unix.Unlinkat(p.fd, temp, 0)
		return p.fail("replace", err)
	}
	return p.sync()
}

func (p *place) make(temp string, s snapshot) error {
	if s.Kind == kindLink {
		if err := unix.Symlinkat(s.Target, p.fd, temp); err != nil {
			return p.fail("link", err)
		}
		if os.Geteuid() == 0 {
			if err := unix.Fchownat(p.fd, temp, s.UID, s.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return p.fail("give away the link", err)
			}
		}
		return nil
	}
	fd, err := unix.Openat(p.fd, temp, unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return p.fail("create a file beside", err)
	}
	f := os.NewFile(uintptr(fd), p.path)
	_, err = f.Write(s.Content)
	if err == nil && os.Geteuid() == 0 {
		err = f.Chown(s.UID, s.GID)
	}
	if err == nil {
		err = unix.Fchmod(fd, s.Mode&modeBits) // after chown, which clears bits
	}
	if err == nil {
		err = writeAttrs(fd, s.Attrs) // after chown, which clears capabilities
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func (p *place) sync() error {
	if err := unix.Fsync(p.fd); err != nil {
		return p.fail("sync directory of", err)
	}
	return nil
}

// read takes a snapshot of a resolved path.
func read(resolved string) (snapshot, error) {
	p, err := openPlace(resolved, false)
	if errors.Is(err, fs.ErrNotExist) {
		return snapshot{Path: resolved, Kind: kindAbsent}, nil
	}
	if err != nil {
		return snapshot{}, err
	}
	defer p.close()
	return p.take()
}

// write puts s at its path and returns the directories it had to make.
func write(s snapshot) (created []string, err error) {
	p, err := openPlace(s.Path, s.Kind != kindAbsent)
	if s.Kind == kindAbsent && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		if p != nil {
			created = p.created
		}
		return created, err
	}
	defer p.close()
	return p.created, p.put(s)
}

// prune removes directories that policies made, innermost first, as far as
// they are empty.
func prune(created []string) {
	for i := len(created) - 1; i >= 0; i-- {
		p, err := openPlace(created[i], false)
		if err != nil {
			continue
		}
		_ = unix.Unlinkat(p.fd, p.name, unix.AT_REMOVEDIR) // not empty: somebody uses it
		p.close()
	}
}
