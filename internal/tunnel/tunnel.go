package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxStreams is how many streams a tunnel holds by default.
	maxStreams = 1024
	// keepAlive is the silence, while there are streams, after which the peer
	// is asked for a sign of life. A tunnel without streams asks nobody.
	keepAlive = 15 * time.Second
	// maxAnswers bounds the answers that wait for a peer who does not read
	// them, in bytes.
	maxAnswers = 1 << 20
	// maxID is the last id that a stream can have.
	maxID = 1<<32 - 1
)

// Handler serves one stream. The stream is closed when it returns; ctx ends
// when the stream is over, or the tunnel.
type Handler func(ctx context.Context, target string, s *Stream)

// Config has the limits of one end. Zero values mean the defaults.
type Config struct {
	// MaxStreams that may be open, 1024 by default. A server refuses more
	// with Overloaded.
	MaxStreams int
	// Budget pays for windows above the first one of a stream; nil: one of
	// 32 MiB for this tunnel alone.
	Budget *Budget
}

// Tunnel is one end of a connection with many streams. All methods are safe
// for concurrent use.
type Tunnel struct {
	conn    net.Conn
	below   *Batch  // nil: writes are not batched
	handler Handler // nil: a client
	cfg     Config

	done  chan struct{}
	wake  chan struct{} // hands the pen over to the writing goroutine
	heard atomic.Bool   // something arrived since the last look

	in reader

	mu       sync.Mutex
	err      error
	ctx      context.Context // of handlers
	streams  map[uint32]*Stream
	fresh    map[*Stream]struct{} // of a client: the server has not heard of them
	last     uint32               // id of the stream opened last
	serving  int                  // handlers that run
	handlers *Crew

	// Output, under mu as well.
	pen     bool      // somebody writes: only he takes from what follows
	control *block    // windows, pings: they may overtake; nil: none
	queue   blockList // frames in order
	flight  blockList // of the holder of the pen: taken, not yet accounted for
	pong    bool      // a ping waits for its answer
	echo    [8]byte   // which repeats this
}

// Client makes the end that opens streams. below is the Batch below the TLS of
// conn, or nil.
func Client(conn net.Conn, below *Batch, cfg Config) *Tunnel {
	return newTunnel(conn, below, nil, cfg)
}

// Server makes the end that serves streams.
func Server(conn net.Conn, below *Batch, h Handler, cfg Config) *Tunnel {
	return newTunnel(conn, below, h, cfg)
}

func newTunnel(conn net.Conn, below *Batch, h Handler, cfg Config) *Tunnel {
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = maxStreams
	}
	if cfg.Budget == nil {
		cfg.Budget = NewBudget(tunnelBudget)
	}
	t := &Tunnel{conn: conn, below: below, handler: h, cfg: cfg, streams: make(map[uint32]*Stream), fresh: make(map[*Stream]struct{}),
		done: make(chan struct{}), wake: make(chan struct{}, 1), handlers: NewCrew()}
	t.in.t = t
	if below != nil {
		below.beforeRead = t.in.wakeReaders
	}
	return t
}

// Run moves the tunnel's bytes until either side closes it, it breaks, or ctx
// is done. It closes the connection and returns when every handler has; the
// error says why.
func (t *Tunnel) Run(ctx context.Context) error {
	hctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t.mu.Lock()
	t.ctx = hctx
	t.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { t.fail(context.Cause(ctx)) })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(t.writeLoop)
	err := t.in.loop()
	t.fail(err)
	cancel()
	wg.Wait()
	t.handlers.Close()
	return t.Err()
}

// Open makes a stream to a target. It does not wait: the other end hears of it
// with the first Write, Read or CloseWrite, and a refusal is what Read returns.
func (t *Tunnel) Open(target string) (*Stream, error) {
	if err := checkTarget(target); err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.err != nil:
		return nil, fmt.Errorf("open stream to %s: %w", target, t.err)
	case t.handler != nil:
		return nil, fmt.Errorf("open stream to %s: only the client opens streams", target)
	case t.streamsLocked() >= t.cfg.MaxStreams || uint64(t.last)+uint64(len(t.fresh)) >= maxID:
		return nil, fmt.Errorf("open stream to %s: %w", target, ErrFull)
	}
	s := newStream(t, target)
	t.fresh[s] = struct{}{}
	return s, nil
}

// announceLocked puts the open frame of a client's stream into the queue, once.
// Ids are given here, in the order in which the server hears of them: an id
// that is not above the last one is known to be an old one.
func (t *Tunnel) announceLocked(s *Stream) {
	if _, ok := t.fresh[s]; !ok {
		return
	}
	delete(t.fresh, s)
	t.last++
	s.id = t.last
	t.streams[s.id] = s
	b := t.frameLocked(header{kindOpen, s.id, len(s.target)})
	copy(b, s.target)
	s.announced.Store(true)
}

// accept starts the handler of a stream that the client has opened.
func (t *Tunnel) accept(id uint32, target string) error {
	if t.handler == nil {
		return fmt.Errorf("%w: a server opens a stream", errFrame)
	}
	if err := checkTarget(target); err != nil {
		return fmt.Errorf("%w: open: %w", errFrame, err)
	}
	t.mu.Lock()
	defer t.pushUnlock()
	if t.err != nil {
		return t.err
	}
	if id <= t.last {
		return fmt.Errorf("%w: stream %d is opened again", errFrame, id)
	}
	t.last = id
	// Handlers are counted, not open streams: a peer that opens and resets
	// in turn does not get more of them.
	if t.serving >= t.cfg.MaxStreams {
		t.resetLocked(id, &RefusedError{Code: Overloaded})
		if t.floodedLocked() {
			return errFlood
		}
		return nil
	}
	s := newStream(t, target)
	s.id = id
	s.announced.Store(true)
	ctx, cancel := context.WithCancel(t.ctx)
	s.cancel = cancel
	t.streams[id] = s
	t.serving++
	t.handlers.Go(func() {
		defer t.served()
		defer func() { _ = s.Close() }()
		t.handler(ctx, target, s)
	})
	return nil
}

// spawn runs a part of a handler: where there are handlers there is a crew.
func (t *Tunnel) spawn(task func()) {
	if t.handler == nil {
		go task()
		return
	}
	t.handlers.Go(task)
}

func (t *Tunnel) served() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.serving--
}

// stream returns a stream by its id; nil is one that is over.
func (t *Tunnel) stream(id uint32) (*Stream, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.streams[id]
	if s == nil && id > t.last {
		return nil, fmt.Errorf("%w: a frame for stream %d, which nobody opened", errFrame, id)
	}
	return s, nil
}

func (t *Tunnel) streamsLocked() int { return len(t.streams) + len(t.fresh) }

// Streams is the number of streams that are open.
func (t *Tunnel) Streams() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.streamsLocked()
}

// Load tells how busy a tunnel is, roughly: the streams that are open, and the
// blocks of 128 KiB that wait to be sent.
func (t *Tunnel) Load() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.streamsLocked() + t.queue.n/blockSize
}

// Done is closed when the tunnel has ended.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err says why the tunnel has ended; nil while it lives.
func (t *Tunnel) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Close ends the tunnel and its streams at once.
func (t *Tunnel) Close() error {
	t.fail(ErrClosed)
	return nil
}

func (t *Tunnel) fail(cause error) {
	if errors.Is(cause, io.EOF) {
		cause = ErrEnded
	}
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return
	}
	t.err = cause
	close(t.done)
	streams := make([]*Stream, 0, t.streamsLocked())
	for _, s := range t.streams {
		streams = append(streams, s)
	}
	for s := range t.fresh {
		streams = append(streams, s)
	}
	clear(t.streams)
	clear(t.fresh)
	for _, s := range streams {
		s.stopLocked(cause)
	}
	t.mu.Unlock()
	// Without a farewell in TLS, which might wait for a stuck peer: streams
	// have ends of their own, so that nothing can be cut off unnoticed.
	if t.below != nil {
		_ = t.below.Close()
	} else {
		_ = t.conn.Close()
	}
	for _, s := range streams {
		s.ended(cause)
	}
}
