package h2client

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a connection may cost, and how it is told apart.
type Config struct {
	// StreamWindow is what one unread stream may hold, ConnWindow what all of
	// them may hold together, in bytes.
	StreamWindow, ConnWindow int
	// MaxHeader bounds the header lists of requests and responses (RFC 9113
	// section 6.5.2), in bytes.
	MaxHeader int
	// KeepAlive is the silence after which a PING is sent. A peer that stays
	// silent for as long again is dead, and so is one that takes nothing of a
	// write in twice that time. 0 or less: never.
	KeepAlive time.Duration
	// HeaderTimeout is how long a peer may take to send response headers; 0: no limit.
	HeaderTimeout time.Duration
	// Authority is that of all requests but CONNECT.
	Authority string
	// Await returns when a Read of the connection may have something to return,
	// and needs less stack for that than the Read does. It may be nil.
	Await func()
	// Late has the preface go along with the first request, for a connection that
	// is made for one.
	Late bool
	// Ended is called once with the reason when the connection has ended, before
	// it is closed. It may be nil.
	Ended func(error)
}

// Conn is an HTTP/2 client on one connection. All methods are safe for
// concurrent use.
type Conn struct {
	nc    net.Conn
	cfg   Config
	began time.Time
	done  chan struct{}
	turn  chan struct{} // holds one token: whose turn it is to write

	// Nanoseconds since began.
	lastRead   atomic.Int64
	writeSince atomic.Int64 // of the write in flight; 0: none

	read readState

	mu      sync.Mutex
	err     error
	streams map[uint32]*Stream
	open    int // streams, and requests that are about to become one
	waiting []chan struct{}
	nextID  uint32
	spoken  bool   // a header block was sent
	goAway  error  // the peer has sent GOAWAY
	lastID  uint32 // of that

	// The peer's settings.
	maxStreams int
	sendWindow int // of new streams
	maxHeader  int

	sendWin int // of the connection: what we may send
	recvWin int // what the peer may send
	credit  int // read, not yet given back

	control []byte // frames to be sent by whoever writes next
	acks    int    // of the frames in control
	pings   map[uint64]chan struct{}
	pinged  uint64
	settled bool // its SETTINGS have come
	limited bool // and said how many streams

	timer   *time.Timer
	aliveAt int64 // when the keep-alive in flight was sent; 0: none is
}

// New makes a client of nc, which it owns from then on, and writes the preface,
// unless that is to be late.
// Close, or the end of nc, ends what it runs.
func New(nc net.Conn, cfg Config) (*Conn, error) {
	c := &Conn{nc: nc, cfg: cfg, began: time.Now(), done: make(chan struct{}), turn: make(chan struct{}, 1),
		streams: map[uint32]*Stream{}, nextID: 1, lastID: maxStreamID, maxStreams: initialMaxStreams, sendWindow: defaultWindow, maxHeader: cfg.MaxHeader,
		sendWin: defaultWindow, recvWin: max(cfg.ConnWindow, defaultWindow)}
	if cfg.Late {
		c.control = c.hello()
	} else if _, err := nc.Write(c.hello()); err != nil {
		_ = nc.Close()
		return nil, err
	}
	c.turn <- struct{}{}
	if cfg.KeepAlive > 0 {
		c.mu.Lock()
		c.timer = time.AfterFunc(cfg.KeepAlive, c.look)
		c.mu.Unlock()
	}
	go c.run()
	return c, nil
}

// hello is the preface, with settings that save us state: no table for header
// compression, no push.
func (c *Conn) hello() []byte {
	settings := appendSetting(nil, settingHeaderTableSize, 0)
	settings = appendSetting(settings, settingEnablePush, 0)
	settings = appendSetting(settings, settingInitialWindowSize, uint32(c.cfg.StreamWindow))
	settings = appendSetting(settings, settingMaxHeaderListSize, uint32(c.cfg.MaxHeader))
	b := frameHeader{length: len(settings), typ: frameSettings}.append([]byte(preface))
	b = append(b, settings...)
	if more := c.recvWin - defaultWindow; more > 0 {
		b = appendWindowUpdate(b, 0, more)
	}
	return b
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil while it lives.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection and all its streams at once.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	return nil
}

// fail ends the connection. Only the first call counts.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	for _, s := range c.streams {
		s.endLocked(err)
	}
	c.streams, c.control, c.pings = nil, nil, nil
	for _, w := range c.waiting {
		close(w)
	}
	c.waiting = nil
	if c.timer != nil {
		c.timer.Stop()
	}
	close(c.done)
	c.mu.Unlock()
	c.sayWhy(err)
	if c.cfg.Ended != nil {
		c.cfg.Ended(err)
	}
	_ = c.nc.Close()
}

// farewell is how long a peer that broke the protocol may take to read why.
const farewell = time.Second

// sayWhy tells a peer that broke the protocol (RFC 9113 section 5.4.1). It is
// called by the read loop, which has nothing else to do any more.
func (c *Conn) sayWhy(err error) {
	e, ok := err.(*ConnError) //nolint:errorlint // ours, made by broken
	if !ok || e.Remote {
		return
	}
	late := time.NewTimer(farewell)
	defer late.Stop()
	select {
	case <-c.turn:
		if c.nc.SetWriteDeadline(time.Now().Add(farewell)) == nil {
			_, _ = c.nc.Write(appendGoAway(nil, e.Code))
		}
		c.turn <- struct{}{}
	case <-late.C:
	}
}

func (c *Conn) now() int64 { return int64(time.Since(c.began)) + 1 }
