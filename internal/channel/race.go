package channel

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"syscall"
	"time"
)

const (
	// headStart is what QUIC gets before HTTP/2 is tried beside it.
	headStart = 300 * time.Millisecond
	// lateQUIC is what QUIC gets after TCP was refused: two round trips by way
	// of a satellite.
	lateQUIC = 2 * time.Second
	// probeMax bounds the time between attempts to return to QUIC.
	probeMax = 15 * time.Minute
)

// attempt is one way to a connection.
type attempt struct {
	after time.Duration // that it waits, unless all before it have failed
	dial  func(context.Context) (*Conn, error)
}

// firstOf makes attempts until one succeeds; the others are cancelled, and a
// connection that comes too late is closed. It returns when all have ended.
func firstOf(ctx context.Context, attempts []attempt) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		c   *Conn
		err error
	}
	results := make(chan result)
	running := 0
	start := func(a attempt) {
		running++
		go func() {
			c, err := a.dial(ctx)
			results <- result{c, err}
		}()
	}
	var won *Conn
	var errs []error
	next := time.NewTimer(0)
	defer next.Stop()
	for len(attempts) > 0 || running > 0 {
		select {
		case <-next.C:
			start(attempts[0])
			if attempts = attempts[1:]; len(attempts) > 0 {
				next.Reset(attempts[0].after)
			}
		case r := <-results:
			running--
			switch {
			case r.err != nil:
				errs = append(errs, r.err)
				if running == 0 && len(attempts) > 0 {
					next.Reset(0)
				}
			case won == nil:
				won, attempts = r.c, nil
				next.Stop()
				cancel()
			default:
				r.c.Close(ErrReplaced)
			}
		}
	}
	if won != nil {
		return won, nil
	}
	return nil, errors.Join(errs...)
}

// carriers are those that a Dialer may use now.
func (d *Dialer) carriers() (h2, h3 bool, err error) {
	want := d.Carrier
	if want == "" {
		want = CarrierAuto
	}
	proxy, err := d.proxyURL()
	if err != nil {
		return false, false, err
	}
	// QUIC cannot go through an HTTP proxy, and bulk is faster without it.
	tcpOnly := proxy != nil || d.DialContext != nil || d.Class == ClassBulk
	if want == CarrierH3 && d.Class != ClassBulk && tcpOnly {
		return false, false, fmt.Errorf("%w: h3 is demanded, and an HTTP proxy (HTTPS_PROXY) stands in the way", ErrNoTransport)
	}
	return want != CarrierH3 || tcpOnly, want != CarrierH2 && !tcpOnly, nil
}

// dialRace makes one attempt over each carrier, QUIC first.
func (d *Dialer) dialRace(ctx context.Context, enroll bool) (*Conn, error) {
	h2, h3, err := d.carriers()
	switch {
	case err != nil:
		return nil, err
	case !h3:
		return d.dialH2(ctx, enroll)
	case !h2:
		return d.dialH3(ctx, enroll)
	}
	return raceOf(ctx, func(ctx context.Context) (*Conn, error) { return d.dialH3(ctx, enroll) },
		func(ctx context.Context) (*Conn, error) { return d.dialH2(ctx, enroll) })
}

// errNobody says that a host which is there has nobody at the port.
var errNobody = errors.New("no answer, and TCP is refused at this port")

// raceOf tries QUIC, and HTTP/2 soon after. A port that refuses TCP is most
// often closed for UDP too, which nobody says: QUIC then gets lateQUIC, instead
// of all the time that it would take to give up.
func raceOf(ctx context.Context, h3, h2 func(context.Context) (*Conn, error)) (*Conn, error) {
	quicCtx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	return firstOf(ctx, []attempt{
		{dial: func(ctx context.Context) (*Conn, error) {
			defer context.AfterFunc(ctx, func() { giveUp(context.Cause(ctx)) })()
			return h3(quicCtx)
		}},
		{after: headStart, dial: func(ctx context.Context) (*Conn, error) {
			c, err := h2(ctx)
			if errors.Is(err, syscall.ECONNREFUSED) {
				late := time.AfterFunc(lateQUIC, func() { giveUp(errNobody) })
				context.AfterFunc(quicCtx, func() { late.Stop() })
			}
			return c, err
		}},
	})
}

// probe tries to return to QUIC while c is on HTTP/2, at growing intervals, and
// delivers the connection that it made. It stops when ctx ends.
func (d *Dialer) probe(ctx context.Context, c *Conn, better chan<- *Conn) {
	h2, h3, err := d.carriers()
	if err != nil || !h2 || !h3 || c.Carrier() == CarrierH3 {
		return
	}
	for wait := d.Backoff.withDefaults().Probe; ; wait = min(2*wait, probeMax) {
		if sleep(ctx, wait/2+rand.N(wait)) != nil {
			return
		}
		dialCtx, cancel := context.WithTimeout(ctx, d.lim.HandshakeTimeout)
		found, err := d.dialH3(dialCtx, c.Enrolling())
		cancel()
		if err != nil {
			continue
		}
		if d.Class != "" {
			found.SetClass(d.Class)
		}
		select {
		case better <- found:
			return
		case <-ctx.Done():
			found.Close(nil)
			return
		}
	}
}
