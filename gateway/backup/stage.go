package backup

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sallyport/internal/atomicfile"
	"sallyport/internal/identity"
	"sallyport/internal/lockdir"
	"sallyport/internal/sealed"
	"sallyport/internal/wire"
)

// maxManifest bounds the manifest, in bytes.
const maxManifest = 64 << 10

// stage holds the unpacked backup until it is put in place: each tree inside
// the directory that it is for, because a directory may be a file system of its
// own, and a rename does not leave one.
type stage struct {
	place    Place
	database string
	manifest Manifest
	bare     bool // the file is a database alone

	identity, authority bool
	pkiLock             *lockdir.Lock
}

// unpack reads the archive to its end. What it read before the end is
// authentic, but may not be all: nothing is used before unpack returned nil.
func (s *stage) unpack(in io.Reader) error {
	if err := errors.Join(RemoveDatabase(s.database), os.RemoveAll(s.tree(treeGateway))); err != nil { // of a restoration that was cut off
		return err
	}
	seen := map[string]bool{}
	for archive := tar.NewReader(in); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		switch {
		case errors.Is(err, sealed.ErrOpen): // which says it all
			return err
		case err != nil:
			return fmt.Errorf("%w: %w", ErrNoBackup, err)
		}
		name := path.Clean(h.Name)
		if seen[name] || h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			return fmt.Errorf("%w: %q stands in it twice, or is neither file nor directory", ErrNoBackup, name)
		}
		seen[name] = true
		if err := s.take(name, h, archive); err != nil {
			return fmt.Errorf("unpack %s: %w", name, err)
		}
	}
	// The end of the archive is not the end of the sealed stream, whose last
	// chunk says that nothing is missing.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	switch {
	case !seen[nameManifest], !seen[nameDatabase]:
		return fmt.Errorf("%w: it lacks its manifest or its database", ErrNoBackup)
	case s.manifest.Authority != s.authority:
		return fmt.Errorf("%w: its manifest and its files disagree about the certificate authority", ErrNoBackup)
	}
	return nil
}

func (s *stage) take(name string, h *tar.Header, in io.Reader) error {
	switch tree, rel, _ := strings.Cut(name, "/"); {
	case name == nameManifest && h.Typeflag == tar.TypeReg:
		b, err := io.ReadAll(io.LimitReader(in, maxManifest))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &s.manifest); err != nil {
			return fmt.Errorf("%w: %w", ErrNoBackup, err)
		}
		if s.manifest.Format != format {
			return fmt.Errorf("it has format %d, this program (older or newer than %s) knows %d", s.manifest.Format, s.manifest.Program, format)
		}
		return nil
	case name == nameDatabase && h.Typeflag == tar.TypeReg:
		return writeNew(s.database, 0o600, in)
	case (tree == treeGateway || tree == treePKI) && filepath.IsLocal(filepath.FromSlash(rel)) && !leaveOut(filepath.FromSlash(rel)):
		return s.takeFile(tree, filepath.FromSlash(rel), h, in)
	}
	return fmt.Errorf("%w: there is no place for it", ErrNoBackup)
}

func (s *stage) tree(tree string) string {
	if tree == treePKI {
		return filepath.Join(s.place.PKI, workRestore)
	}
	return filepath.Join(s.place.Gateway, workRestore)
}

func (s *stage) takeFile(tree, rel string, h *tar.Header, in io.Reader) error {
	switch tree {
	case treeGateway:
		s.identity = true
	case treePKI:
		if err := s.lockPKI(); err != nil {
			return err
		}
		s.authority = true
	}
	target := filepath.Join(s.tree(tree), rel)
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode).Perm() &^ 0o022 // as it was, but for the writing of others
	if h.Typeflag == tar.TypeDir {
		if err := os.MkdirAll(target, 0o700); err != nil {
			return err
		}
		return os.Chmod(target, mode|0o700)
	}
	if err := writeNew(target, mode, in); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(target))
}

// lockPKI makes sure that no process uses the authority.
func (s *stage) lockPKI() error {
	if s.pkiLock != nil {
		return nil
	}
	if err := lockdir.Make(s.place.PKI, 0o700); err != nil {
		return err
	}
	lock, err := lockdir.Acquire(s.place.PKI)
	if err != nil {
		return err
	}
	s.pkiLock = lock
	return os.RemoveAll(s.tree(treePKI))
}

// keepRevocations takes over the newer revocation set of the authority that is
// replaced, when it is the same one: a backup knows nothing of the keys that
// were revoked after it. (Sets that only RCPs hold are merged when they
// connect.)
func (s *stage) keepRevocations() error {
	if !s.authority {
		return nil
	}
	const issuer, set = "intermediate.pem", "revocations.json"
	read := func(dir, name string) []byte { b, _ := os.ReadFile(filepath.Join(dir, name)); return b }
	dirs := []string{s.place.PKI}
	if Interrupted(s.place) != nil { // what was here is partly put aside, the issuer first
		aside, err := filepath.Glob(filepath.Join(s.place.PKI, keptPrefix+"*"))
		if err != nil {
			return err
		}
		dirs = append(dirs, aside...)
	}
	of := func(dir string) string { // whose set lies in dir
		if b := read(dir, issuer); len(b) > 0 {
			return string(b)
		}
		return string(read(dirs[len(dirs)-1], issuer))
	}
	ours, newest := string(read(s.tree(treePKI), issuer)), read(s.tree(treePKI), set)
	held := numberOf(newest)
	roots, err := s.roots()
	if err != nil {
		return err
	}
	td := strings.TrimSpace(string(read(s.tree(treePKI), "trust-domain")))
	for _, dir := range dirs {
		if b := read(dir, set); ours != "" && numberOf(b) > numberOf(newest) && (of(dir) == ours || sealedBelow(b, roots, td)) {
			newest = b
		}
	}
	if numberOf(newest) <= held {
		return nil
	}
	target := filepath.Join(s.tree(treePKI), set)
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeNew(target, 0o600, bytes.NewReader(newest))
}

// roots are those of the authority that is restored. The file of its issuer is
// another one after a change of the root, and after an external CA has moved on;
// what these roots vouch for is its own set all the same.
func (s *stage) roots() (roots []*x509.Certificate, err error) {
	files, err := filepath.Glob(filepath.Join(s.tree(treePKI), "root*.pem"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		block, _ := pem.Decode(b)
		if block == nil {
			continue // whoever opens the authority says so
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			roots = append(roots, c)
		}
	}
	return roots, nil
}

// sealedBelow tells whether a revocation set is one of these roots and of this trust
// domain: below the root of an organisation there may be other installations.
func sealedBelow(b []byte, roots []*x509.Certificate, trustDomain string) bool {
	var env wire.Envelope
	var set struct {
		Issued time.Time `json:"issued"`
	}
	if json.Unmarshal(b, &env) != nil || json.Unmarshal(env.Payload, &set) != nil {
		return false
	}
	_, err := identity.VerifyRevocations(env, roots, trustDomain, set.Issued)
	return err == nil
}

// numberOf reads the number of a revocation set, without any check: whoever
// uses the set verifies it.
func numberOf(b []byte) int64 {
	var env struct {
		Payload []byte `json:"payload"`
	}
	var set struct {
		Number int64 `json:"number"`
	}
	if json.Unmarshal(b, &env) != nil || json.Unmarshal(env.Payload, &set) != nil {
		return 0
	}
	return set.Number
}

// own gives what root unpacked to the user that the gateway runs as: the one that
// owns its directory, or the one above where that is new.
func (s *stage) own() error {
	if os.Geteuid() != 0 {
		return nil
	}
	var uid, gid int
	for _, dir := range []string{s.place.Gateway, filepath.Dir(s.place.Gateway)} {
		st, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if owner, ok := st.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
			uid, gid = int(owner.Uid), int(owner.Gid)
			break
		}
	}
	if uid == 0 {
		return nil
	}
	// Who owns the directories could have put links there, to files of others.
	locks := []string{filepath.Join(s.place.Gateway, lockName), filepath.Join(s.place.PKI, lockName), s.place.Database + ".lock"}
	for _, made := range append(locks, s.place.Gateway, s.place.PKI) {
		if err := os.Lchown(made, uid, gid); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, root := range []string{s.database, s.tree(treeGateway), s.tree(treePKI)} {
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(path, uid, gid)
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// clear removes what was staged and not put in place.
func (s *stage) clear() error {
	errs := []error{RemoveDatabase(s.database), os.RemoveAll(s.tree(treeGateway))}
	if s.pkiLock != nil {
		errs = append(errs, os.RemoveAll(s.tree(treePKI)), s.pkiLock.Release())
	}
	return errors.Join(errs...)
}
