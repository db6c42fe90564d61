package channel

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"sallyport/internal/wire"
)

const (
	// growAt is the share of a connection's streams, in percent, at which
	// another connection is opened.
	growAt = 80
	// growWait is how long a stream waits for a new connection before it
	// shares the admin one.
	growWait = time.Second
	// growIdle is how long a connection that was opened on demand may be
	// without a stream before it is closed.
	growIdle = 5 * time.Minute
)

// ErrNotConnected says that no connection to the party is there.
var ErrNotConnected = errors.New("not connected")

// Link holds all connections to one downstream party: one of class admin, and
// those of class session that Connect opens when there is something to carry.
// Either we dial them ([Link.Run]), or the party dials us ([Link.Attach]) and is
// asked for more with POST /v1/channels.
type Link struct {
	log *slog.Logger

	mu      sync.Mutex
	conns   []*Conn // oldest first
	change  chan struct{}
	want    map[string]time.Time // classes asked for, and until when they are awaited
	dial    chan string          // of Run: classes to dial; nil: the party dials us
	refused *Conn                // the admin connection on which more were refused
}

// NewLink makes a Link without connections.
func NewLink(log *slog.Logger) *Link {
	return &Link{log: log, change: make(chan struct{}), want: map[string]time.Time{}}
}

// Run keeps the party connected through d, as [Dialer.Run] does, and calls f
// for each admin connection.
func (l *Link) Run(ctx context.Context, d *Dialer, f func(context.Context, *Conn)) error {
	if d.Peer != PeerDownstream {
		return fmt.Errorf("link to %s: %w", d.Addr, ErrWrongSide)
	}
	l.mu.Lock()
	l.dial = make(chan string, 1)
	l.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { l.growByDialling(ctx, d, &wg) })
	return d.Run(ctx, func(ctx context.Context, c *Conn) {
		defer l.Attach(c)()
		f(ctx, c)
	})
}

// Attach adds a connection that the party dialled, or that the caller dialled
// himself, until detach is called. It gives the connection its class.
func (l *Link) Attach(c *Conn) (detach func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if until, ok := l.want[ClassSession]; ok && !c.dialled && c.Class() == ClassAdmin && time.Now().Before(until) && l.adminLocked() != nil {
		c.SetClass(ClassSession)
	}
	delete(l.want, c.Class())
	l.conns = append(l.conns, c)
	l.wake()
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.conns = slices.DeleteFunc(l.conns, func(o *Conn) bool { return o == c })
		l.wake()
	}
}

func (l *Link) wake() {
	close(l.change)
	l.change = make(chan struct{})
}

// Conns are the live connections, oldest first.
func (l *Link) Conns() []*Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.conns), func(c *Conn) bool { return c.Err() != nil })
}

// Admin is the newest connection for peers, signals and control; nil while
// not connected.
func (l *Link) Admin() *Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.adminLocked()
}

func (l *Link) adminLocked() *Conn {
	var spare *Conn
	for _, c := range slices.Backward(l.conns) {
		switch {
		case c.Err() != nil || c.Class() == ClassBulk:
		case c.Class() == ClassAdmin:
			return c
		case spare == nil:
			spare = c
		}
	}
	return spare
}

// Connect opens a stream to authority through the party, on the connection of
// class session that has the fewest. On an enrolment channel it uses that.
func (l *Link) Connect(ctx context.Context, authority string, h http.Header) (net.Conn, error) {
	c, err := l.pick(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect %s: %w", authority, err)
	}
	return c.Connect(ctx, authority, h)
}

func (l *Link) pick(ctx context.Context) (*Conn, error) {
	deadline := time.NewTimer(growWait)
	defer deadline.Stop()
	for {
		l.mu.Lock()
		best, change := l.bestLocked(), l.change
		admin := l.adminLocked()
		l.mu.Unlock()
		if admin == nil {
			return nil, ErrNotConnected
		}
		if admin.Enrolling() {
			return admin, nil
		}
		if best != nil && !best.crowded() {
			return best, nil
		}
		growing := l.grow(ctx, ClassSession)
		if best != nil && (!best.full() || !growing) {
			return best, nil // crowded; another one may be on its way
		}
		if !growing {
			return admin, nil
		}
		select {
		case <-change:
		case <-deadline.C:
			if best != nil {
				return best, nil // where the stream waits for a slot
			}
			return admin, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// bestLocked is the connection of class session with the fewest streams.
func (l *Link) bestLocked() *Conn {
	var best *Conn
	for _, c := range l.conns {
		if c.Class() == ClassSession && c.Err() == nil && !c.Draining() && (best == nil || c.Streams() < best.Streams()) {
			best = c
		}
	}
	return best
}

// crowded tells whether another connection should be opened.
func (c *Conn) crowded() bool { return c.Streams()*100 >= c.limits.Streams*growAt }

// full tells whether a further stream would wait for a slot.
func (c *Conn) full() bool { return c.Streams() >= c.limits.Streams }

// grow asks for another connection of a class, once at a time; it tells
// whether one is to be expected.
func (l *Link) grow(ctx context.Context, class string) bool {
	l.mu.Lock()
	admin, dial := l.adminLocked(), l.dial
	if until, ok := l.want[class]; ok && time.Now().Before(until) {
		l.mu.Unlock()
		return true
	}
	if admin == nil || dial == nil && l.refused == admin {
		l.mu.Unlock()
		return false
	}
	l.want[class] = time.Now().Add(10 * time.Second)
	l.mu.Unlock()
	if dial != nil {
		select {
		case dial <- class:
		default: // the one before it is still being dialled
		}
		return true
	}
	if err := askForMore(ctx, admin, class); err != nil {
		l.log.Debug("no further connection", "peer", admin.Peer().String(), "class", class, "err", err)
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.want, class)
		if ctx.Err() == nil {
			l.refused = admin
		}
		return false
	}
	return true
}

// askForMore asks a party that dials us for another connection.
func askForMore(ctx context.Context, admin *Conn, class string) error {
	b, err := json.Marshal(wire.MoreChannels{Class: class})
	if err != nil {
		return err
	}
	req := (&http.Request{Method: http.MethodPost, URL: &url.URL{Path: wire.PathChannels}, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(b)), ContentLength: int64(len(b))}).WithContext(ctx)
	res, err := admin.RoundTrip(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode/100 != 2 {
		return &RefusedError{Status: res.StatusCode, Reason: headerText(res.Header.Get(wire.HeaderError))}
	}
	return nil
}

// growByDialling dials what grow asks for.
func (l *Link) growByDialling(ctx context.Context, d *Dialer, wg *sync.WaitGroup) {
	more := d.withClass(ClassSession)
	for {
		select {
		case <-l.dial:
		case <-ctx.Done():
			return
		}
		c, err := more.Dial(ctx)
		if err != nil {
			l.log.Info("further connection failed", "address", d.Addr, "class", ClassSession, "err", err)
			l.mu.Lock()
			delete(l.want, ClassSession)
			l.wake()
			l.mu.Unlock()
			continue
		}
		wg.Go(func() { l.hold(ctx, c) })
	}
}

// hold keeps a connection that was opened on demand while it is in use.
func (l *Link) hold(ctx context.Context, c *Conn) {
	conns := newRegistry(c.id)
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	conns.add(c)
	wg.Go(func() { conns.watch(ctx) })
	defer l.Attach(c)()
	defer c.tails.Wait()
	defer c.Close(nil)
	check := time.NewTicker(growIdle)
	defer check.Stop()
	was := -1
	for {
		select {
		case <-check.C:
			if c.Streams() == 0 && was == 0 {
				c.Close(ErrIdle)
			}
			was = c.Streams()
		case <-c.DrainRequested():
			c.retire(ctx, retireGrace)
			return
		case <-c.Done():
			return
		case <-ctx.Done():
			return
		}
	}
}

// ErrIdle says that a connection was closed because nothing used it.
var ErrIdle = errors.New("channel was idle")
