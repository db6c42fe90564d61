package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/gateway/api"
	"sallyport/gateway/bus"
	"sallyport/gateway/store"
	"sallyport/internal/tunnel"
	"sallyport/internal/wire"
)

const (
	// maxForwards bounds the listeners, maxForwardConns the connections of all
	// of them: each is a file that this process has open.
	maxForwards     = 256
	maxForwardConns = 8192
	// forwardRetry is how often a listener is tried again that could not be had.
	forwardRetry = 10 * time.Second
)

// forwards are the TCP listeners of this gateway. The database says which
// there should be.
type forwards struct {
	t   *targets
	db  *store.DB
	log *slog.Logger

	change sync.Mutex // one at a time changes what listens

	mu      sync.Mutex
	open    map[string]*forward // by address
	failed  map[string]string   // why an address cannot be had
	running sync.WaitGroup      // accepting, and connections
	conns   int
	closed  bool
}

func newForwards(t *targets, db *store.DB, log *slog.Logger) *forwards {
	return &forwards{t: t, db: db, log: log, open: map[string]*forward{}, failed: map[string]string{}}
}

// run keeps the listeners as the database says, until ctx ends; what runs then
// gets drainTime to end by itself.
func (f *forwards) run(ctx context.Context, b bus.Bus) error {
	wakes, cancel := b.Subscribe(bus.Forwards)
	defer cancel()
	retry := time.NewTicker(forwardRetry)
	defer retry.Stop()
	for {
		if err := f.reconcile(ctx); err != nil && ctx.Err() == nil {
			f.log.Error("forwards not read; it is tried again", "error", err)
		}
		select {
		case <-ctx.Done():
			f.stop()
			return nil
		case <-wakes:
		case <-retry.C:
		}
	}
}

// stop closes everything.
func (f *forwards) stop() {
	f.change.Lock()
	defer f.change.Unlock()
	f.mu.Lock()
	f.closed = true
	all := make([]*forward, 0, len(f.open))
	for _, w := range f.open {
		all = append(all, w)
	}
	f.mu.Unlock()
	for _, w := range all {
		_ = w.listener.Close()
	}
	cut := time.AfterFunc(drainTime, func() {
		for _, w := range all {
			w.cut()
		}
	})
	f.running.Wait()
	cut.Stop()
	for _, w := range all {
		w.cut() // releases its context
	}
}

// reconcile opens what the database has and we have not, and the other way
// round.
func (f *forwards) reconcile(ctx context.Context) error {
	f.change.Lock()
	defer f.change.Unlock()
	rows, err := f.db.Forwards(ctx)
	if err != nil {
		return err
	}
	over, err := f.over(ctx)
	if err != nil {
		return err
	}
	want := make(map[string]bool, len(rows))
	for _, row := range rows {
		if over[row.Listen] {
			continue
		}
		want[row.Listen] = true
		if f.at(row.Listen) != nil {
			continue
		}
		ln, err := listenForward(ctx, row.Listen)
		if err == nil {
			f.adopt(row, ln)
			continue
		}
		f.mu.Lock()
		if f.failed[row.Listen] != err.Error() {
			f.log.Error("a forward cannot listen; it is tried again", "listen", row.Listen, "target", row.Target, "error", err)
		}
		f.failed[row.Listen] = err.Error()
		f.mu.Unlock()
	}
	f.mu.Lock()
	var gone []*forward
	for listen, w := range f.open {
		if !want[listen] {
			gone = append(gone, w)
		}
	}
	for listen := range f.failed {
		if !want[listen] {
			delete(f.failed, listen)
		}
	}
	f.mu.Unlock()
	for _, w := range gone {
		f.close(w)
	}
	return nil
}

// over are the forwards that have outlived the token that they were made with:
// they end also when the database cannot be told of it.
func (f *forwards) over(ctx context.Context) (map[string]bool, error) {
	rows, err := f.db.OverForwards(ctx, time.Now())
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	out := make(map[string]bool, len(rows))
	for _, row := range rows {
		out[row.Listen] = true
	}
	if err := f.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return tx.EndForwards(ctx) }); err != nil {
		f.log.Error("forwards whose API token is over are not removed; they are closed", "error", err)
	}
	return out, nil
}

func (f *forwards) at(listen string) *forward {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open[listen]
}

// adopt serves a listener.
func (f *forwards) adopt(row *store.Forward, ln *net.TCPListener) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &forward{row: row, listener: ln, f: f}
	w.ctx, w.cut = context.WithCancel(context.Background())
	if f.closed { // we are stopping
		w.cut()
		_ = ln.Close()
		return
	}
	f.open[row.Listen] = w
	delete(f.failed, row.Listen)
	f.running.Go(w.accept)
	f.log.Info("forward listens", "listen", row.Listen, "target", row.Target, "node", string(row.NodeID))
}

// close ends a forward with all its connections.
func (f *forwards) close(w *forward) {
	_ = w.listener.Close()
	w.cut()
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, w.row.Listen)
	f.log.Info("forward ended", "listen", w.row.Listen, "target", w.row.Target)
}

// add opens a listener and stores it. Port 0 takes a free one.
func (f *forwards) add(ctx context.Context, row *store.Forward, detail string) error {
	f.change.Lock()
	defer f.change.Unlock()
	rows, err := f.db.Forwards(ctx)
	if err != nil {
		return err
	}
	if len(rows) >= maxForwards {
		return api.NewProblem(api.CodeConflict, fmt.Sprintf("there are %d forwards, which is the limit: remove one with `sallyport target unforward`", len(rows)))
	}
	for _, other := range rows {
		if other.Listen == row.Listen {
			return api.NewProblem(api.CodeExists, fmt.Sprintf("%s is a forward to %s already: `sallyport target unforward %s` removes it", row.Listen, other.Target, row.Listen))
		}
	}
	ln, err := listenForward(ctx, row.Listen)
	if err != nil {
		return api.NewProblem(api.CodeConflict, err.Error())
	}
	row.Listen = ln.Addr().String()
	err = f.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "target.forward", "target "+row.Target, detail+" on "+row.Listen)
		return tx.AddForward(ctx, row)
	})
	if err != nil {
		_ = ln.Close() // nobody knows it
		return err
	}
	f.adopt(row, ln)
	return nil
}

// remove takes a forward back and cuts its connections.
func (f *forwards) remove(ctx context.Context, row *store.Forward) error {
	f.change.Lock()
	defer f.change.Unlock()
	err := f.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		tx.Audit(ctx, "target.unforward", "target "+row.Target, "on "+row.Listen)
		return tx.RemoveForward(ctx, row.Listen)
	})
	if err != nil {
		return err
	}
	if w := f.at(row.Listen); w != nil {
		f.close(w)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.failed, row.Listen)
	return nil
}

// look adds to a row what is known of its listener.
func (f *forwards) look(row *store.Forward) api.Forward {
	v := api.Forward{Listen: row.Listen, Target: row.Target, State: api.ForwardFailed, Created: utc(row.CreatedAt), CreatedBy: row.CreatedBy}
	if row.NodeID != "" {
		v.NodeID, v.Node = row.NodeID, f.t.fleet.nameNow(row.NodeID)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	v.Error = f.failed[row.Listen]
	if w := f.open[row.Listen]; w != nil {
		v.State, v.Connections, v.Total = api.ForwardListening, int(w.active.Load()), w.total.Load()
		v.Refused, v.BytesTo, v.BytesFrom = w.refused.Load(), w.bytesTo.Load(), w.bytesFrom.Load()
	}
	return v
}

// parseListen reads an address to listen on: PORT, :PORT or HOST:PORT. Without
// a host it is loopback. The host is an address of this machine, not a name:
// what a name means may change.
func parseListen(s string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = "", s
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not an address to listen on (want PORT, :PORT or ADDRESS:PORT)", wire.Quotable(s))
	}
	switch host {
	case "", "localhost":
		host = "127.0.0.1"
	case "*":
		host = "0.0.0.0"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not an IP address of this machine (want PORT, :PORT or ADDRESS:PORT)", wire.Quotable(host))
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// keepAlive sets on a listener what its connections inherit, so that each of
// them is spared four calls: a client that is silent for 15 s is asked every 15
// s whether it is there, nine times.
func keepAlive(_, _ string, c syscall.RawConn) error {
	var errs []error
	err := c.Control(func(fd uintptr) {
		for _, o := range []struct{ level, option, value int }{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 15},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 15},
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 9},
		} {
			errs = append(errs, unix.SetsockoptInt(int(fd), o.level, o.option, o.value))
		}
	})
	return errors.Join(append(errs, err)...)
}

// listenForward opens a listener, or says who is in the way.
func listenForward(ctx context.Context, listen string) (*net.TCPListener, error) {
	conf := net.ListenConfig{KeepAlive: -1, Control: keepAlive}
	ln, err := conf.Listen(ctx, "tcp", listen)
	if err == nil {
		return ln.(*net.TCPListener), nil // tcp gives no other
	}
	why := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		why = ": another program listens there"
		if who := portHolder(listen); who != "" {
			why = ": " + who + " listens there"
		}
	case errors.Is(err, syscall.EACCES):
		why = ": ports below 1024 need root, or the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		why = ": this machine has no such address"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err // it repeats the address
	}
	return nil, fmt.Errorf("cannot listen on %s: %w%s", listen, err, why)
}

// forward is one listener with its connections.
type forward struct {
	f        *forwards
	row      *store.Forward
	listener *net.TCPListener
	ctx      context.Context // of the connections
	cut      context.CancelFunc

	active, total, refused, bytesTo, bytesFrom atomic.Int64
}

// accept takes connections until the listener is closed.
func (w *forward) accept() {
	pause := 5 * time.Millisecond
	for {
		c, err := w.listener.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no more files, or the client is gone already
			w.f.log.Warn("forward cannot accept; it goes on", "listen", w.row.Listen, "error", err)
			select {
			case <-time.After(pause):
			case <-w.ctx.Done():
				return
			}
			pause = min(2*pause, time.Second)
			continue
		}
		pause = 5 * time.Millisecond
		w.total.Add(1)
		if !w.f.admit() {
			w.refuse(c, "limit")
			continue
		}
		w.f.running.Go(func() {
			defer w.f.leave()
			w.serve(c)
		})
	}
}

func (f *forwards) admit() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conns >= maxForwardConns {
		return false
	}
	f.conns++
	return true
}

func (f *forwards) leave() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns--
}

// refuse resets a connection: its client is not to take it for an answer that
// is complete.
func (w *forward) refuse(c *net.TCPConn, result string) {
	w.refused.Add(1)
	w.f.t.metrics.connections.WithLabelValues(result).Inc()
	reset(c)
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // at worst it ends in order
	_ = c.Close()
}

// serve carries one connection to its end.
func (w *forward) serve(c *net.TCPConn) {
	t := w.f.t
	leave, ok := t.enter(w.row.Target, t.limit)
	if !ok {
		w.refuse(c, "limit")
		return
	}
	defer leave()
	w.active.Add(1)
	t.metrics.open.Inc()
	defer func() {
		w.active.Add(-1)
		t.metrics.open.Dec()
	}()
	j := &joining{client: c}
	stop := context.AfterFunc(w.ctx, func() { reset(c) })
	err := w.carry(j)
	stop()
	w.bytesTo.Add(j.toward.Load())
	w.bytesFrom.Add(j.back.Load())
	t.metrics.bytes.WithLabelValues("forward", "to").Add(float64(j.toward.Load()))
	t.metrics.bytes.WithLabelValues("forward", "from").Add(float64(j.back.Load()))
	if err == nil {
		t.metrics.connections.WithLabelValues("ok").Inc()
		_ = c.Close()
		return
	}
	var ours clientError
	var refused *tunnel.RefusedError
	result := "failed"
	switch {
	case w.ctx.Err() != nil:
		result = "cut"
	case errors.As(err, &ours):
		result = "client"
	case errors.As(err, &refused) && refused.Code == tunnel.Reset:
		result = "reset"
	default:
		w.refused.Add(1)
	}
	t.metrics.connections.WithLabelValues(result).Inc()
	w.f.log.Debug("forwarded connection broke", "listen", w.row.Listen, "target", w.row.Target, "client", c.RemoteAddr().String(), "error", err)
	reset(c)
}

// carry joins a client with a stream, and with one by way of another node as
// long as nothing can have reached the target.
func (w *forward) carry(j *joining) error {
	t, target := w.f.t, w.row.Target
	var tried []wire.ID
	var last error
	for {
		ch, err := t.pick(target, w.row.NodeID, tried...)
		if err != nil {
			if last != nil {
				return last
			}
			return err
		}
		if last != nil {
			t.metrics.retries.Inc()
		}
		last = w.carryBy(j, ch)
		if last == nil || w.ctx.Err() != nil {
			return last
		}
		if _, ok := errors.AsType[clientError](last); ok {
			return last
		}
		t.failure(ch.node, target, last)
		tried = append(tried, ch.node)
		if !j.untouched() && !(unreached(last) && j.again()) || len(tried) == maxNodeTries {
			return last
		}
	}
}

func (w *forward) carryBy(j *joining, ch choice) error {
	defer ch.done()
	t := w.f.t
	stream, err := t.open(w.ctx, ch.node, w.row.Target, ch.alone)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(w.ctx, func() { abort(stream) })
	defer stop()
	if err := j.run(stream); err != nil {
		return err
	}
	t.worked(ch.node, w.row.Target)
	return nil
}
