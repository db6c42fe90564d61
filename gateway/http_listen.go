package gateway

import (
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

const (
	// maxAPIConns bounds the connections of the https address, which strangers can
	// open; apiFileShare is the part of the files that this process may have open which
	// they may take of it at most: channels and the database need the others.
	maxAPIConns  = 8192
	apiFileShare = 4
)

// crowd counts the connections of a listener by where they come from. Nobody has
// more of them than are free: who takes all that he can get leaves room for those
// who come from elsewhere.
type crowd struct {
	net.Listener
	limit int
	log   *slog.Logger
	told  rate.Sometimes // of who is turned away

	mu  sync.Mutex
	all int
	by  map[netip.Prefix]int
}

func newCrowd(ln net.Listener, log *slog.Logger) *crowd {
	limit := maxAPIConns
	var files unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur/apiFileShare < maxAPIConns {
		limit = int(files.Cur / apiFileShare)
	}
	return &crowd{Listener: ln, limit: limit, log: log, told: rate.Sometimes{Interval: time.Minute}, by: map[netip.Prefix]int{}}
}

// Accept returns the next connection that there is room for; others are closed.
func (c *crowd) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := siteOf(conn.RemoteAddr().String())
		if c.enter(from) {
			return &crowdConn{Conn: conn, leave: sync.OnceFunc(func() { c.leave(from) })}, nil
		}
		_ = conn.Close()
		c.told.Do(func() {
			c.log.Warn("connections to the API are turned away: their source has half of those that are left", "source", from, "limit", c.limit)
		})
	}
}

func (c *crowd) enter(from netip.Prefix) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by[from] >= c.limit-c.all {
		return false
	}
	c.all++
	c.by[from]++
	return true
}

func (c *crowd) leave(from netip.Prefix) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
	if c.by[from]--; c.by[from] == 0 {
		delete(c.by, from)
	}
}

type crowdConn struct {
	net.Conn
	leave func()
}

func (c *crowdConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
