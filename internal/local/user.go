package local

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// maxConnsPerUser bounds the connections of one user id, so that nobody can
// shut out the others.
const maxConnsPerUser = 32

// nobody is the user id for a peer whom the kernel does not name: (uid_t)-1
// belongs to no user.
const nobody = ^uint32(0)

type userKey struct{}

// withUser is an http.Server.ConnContext.
func withUser(ctx context.Context, c net.Conn) context.Context {
	uid := nobody
	if u, ok := c.(*userConn); ok {
		uid = u.uid
	}
	return context.WithValue(ctx, userKey{}, uid)
}

// privileged refuses everybody but root and the user that we run as.
func privileged(ctx context.Context, what string) error {
	uid, ok := ctx.Value(userKey{}).(uint32)
	if ok && (uid == 0 || uid == uint32(os.Geteuid())) {
		return nil
	}
	return &Error{CodeForbidden, fmt.Sprintf("%s: only root and the service's own user (uid %d) may do this, you are uid %d: use sudo", what, os.Geteuid(), int32(uid))}
}

// userListener knows who connects and counts connections per user.
type userListener struct {
	*net.UnixListener
	mu   sync.Mutex
	open map[uint32]int
}

func (l *userListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid := peerUser(c)
		if l.take(uid) {
			return &userConn{UnixConn: c, uid: uid, l: l}, nil
		}
		_ = c.Close()
	}
}

func (l *userListener) take(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[uid] >= maxConnsPerUser {
		return false
	}
	l.open[uid]++
	return true
}

func (l *userListener) release(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[uid]--; l.open[uid] <= 0 {
		delete(l.open, uid)
	}
}

type userConn struct {
	*net.UnixConn
	uid  uint32
	l    *userListener
	once sync.Once
}

func (c *userConn) Close() error {
	c.once.Do(func() { c.l.release(c.uid) })
	return c.UnixConn.Close()
}

// peerUser asks the kernel (unix(7), SO_PEERCRED): credentials at connect time.
func peerUser(c *net.UnixConn) uint32 {
	uid := nobody
	raw, err := c.SyscallConn()
	if err != nil {
		return uid
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = cred.Uid
		}
	})
	return uid
}

// maxSocketPath is what fits into sockaddr_un.sun_path with its final NUL.
const maxSocketPath = 107

// socketAddr returns an address that fits into sockaddr_un. A longer path goes
// through a descriptor of its directory. The address holds until done.
func socketAddr(path string) (addr *net.UnixAddr, done func(), err error) {
	if len(path) <= maxSocketPath {
		return &net.UnixAddr{Name: path, Net: "unix"}, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	short := fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(path))
	return &net.UnixAddr{Name: short, Net: "unix"}, func() { _ = unix.Close(fd) }, nil
}
