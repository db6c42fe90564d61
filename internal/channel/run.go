package channel

import (
	"context"
	"crypto/tls"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

const (
	// steady is how long a connection must live to count as a success.
	steady = 10 * time.Second
	// retireGrace is how long a replaced connection may finish its streams.
	retireGrace = 30 * time.Second
)

// Run keeps the address connected until ctx is done: jitter before the first
// attempt, jittered exponential backoff between attempts, and a replacement
// made before the old connection is broken when our leaf was renewed, when
// either leaf is about to end, when the peer drains, or when a better carrier
// is back. f is called in a goroutine of its own for each connection, so for a
// moment it may run for two; when it returns, the connection is closed. Run
// returns when every f has.
func (d *Dialer) Run(ctx context.Context, f func(context.Context, *Conn)) error {
	if err := d.init(); err != nil {
		return err
	}
	k := &keeper{d: d, f: f, backoff: d.Backoff.withDefaults(), conns: newRegistry(d.Identity)}
	ctx, cancel := context.WithCancelCause(ctx)
	defer k.wg.Wait()
	defer cancel(nil)
	k.wg.Go(func() { k.conns.watch(ctx) })
	return k.run(ctx)
}

// keeper is the state of one Run.
type keeper struct {
	d        *Dialer
	f        func(context.Context, *Conn)
	backoff  Backoff
	conns    *registry
	wg       sync.WaitGroup
	failures int
	current  *Conn
	since    time.Time
	met      wire.ID // who answered last
	tries    int     // to reach a party that was there already, in a row
}

func (k *keeper) run(ctx context.Context) error {
	if err := k.pause(ctx, k.backoff.first()); err != nil {
		return err
	}
	var found *Conn // made by a probe
	for {
		if found == nil {
			if err := k.elsewhere(ctx); err != nil {
				return err
			}
		}
		changed := identityState(k.d.Identity)
		c, err := found, error(nil)
		if found = nil; c == nil {
			c, err = k.d.Dial(ctx)
		}
		if ctx.Err() != nil {
			if c != nil {
				c.Close(nil)
			}
			return context.Cause(ctx)
		}
		if err != nil {
			k.failures++
			wait := k.backoff.after(k.failures)
			k.report(err, time.Now().Add(wait))
			if k.failures == 1 || k.failures%10 == 0 {
				k.d.Log.Info("dial failed", "address", k.d.Addr, "failures", k.failures, "err", err, "retry_in", wait.Round(time.Millisecond))
			}
			if err := k.pause(ctx, wait); err != nil {
				return err
			}
			continue
		}
		old := k.current
		k.current, k.since, k.met = c, time.Now(), c.Peer().Party.ID
		k.start(ctx, c)
		if old != nil {
			k.wg.Go(func() { old.retire(ctx, retireGrace) })
		}
		k.report(nil, time.Time{})
		if found, err = k.hold(ctx, c, changed); err != nil {
			return err
		}
	}
}

// elsewhere waits while the party that answered here last is there by another
// connection, and none of ours is: its other address, or it dials us. The wait
// doubles with each attempt that was replaced.
func (k *keeper) elsewhere(ctx context.Context) error {
	if k.d.Elsewhere == nil || k.met == "" || k.current != nil && k.current.Err() == nil && !k.current.Draining() {
		return nil
	}
	other := k.d.Elsewhere(k.met)
	if other == nil {
		k.tries = 0
		return nil
	}
	wait := min(k.backoff.Probe<<min(k.tries, 20), probeMax)
	wait = wait/2 + rand.N(wait)
	k.tries++
	k.failures, k.since = 0, time.Now()
	k.d.Log.Info("the party is there by another channel", "address", k.d.Addr, "peer", other.Peer().String(), "by", other.RemoteAddr(), "dialled", other.Dialled(), "retry_in", wait.Round(time.Second))
	k.tell(State{Instead: other, Next: k.since.Add(wait), Since: k.since})
	if left, err := k.wait(ctx, wait, other); !left || err != nil {
		return err
	}
	return k.pause(ctx, k.backoff.first())
}

// start runs f for a connection, which it owns until it has ended.
func (k *keeper) start(ctx context.Context, c *Conn) {
	k.wg.Go(func() {
		stop := context.AfterFunc(ctx, func() { c.Close(context.Cause(ctx)) })
		defer stop()
		if c.Enrolling() && k.d.Peer == PeerUpstream && !waiting(k.d.Identity) {
			late := time.AfterFunc(offerTime, func() { c.Close(errNoOffer) })
			defer late.Stop()
		}
		k.conns.add(c)
		defer k.conns.remove(c)
		defer c.tails.Wait()
		defer c.Close(nil)
		k.f(ctx, c)
	})
}

// hold returns without an error when it is time to dial again: the connection
// has ended and the wait after that is over, or it is to be replaced, perhaps
// by one that is there already.
func (k *keeper) hold(ctx context.Context, c *Conn, was identityKey) (*Conn, error) {
	var renew <-chan time.Time
	if !c.Expires().IsZero() {
		left := time.Until(c.Expires())
		t := time.NewTimer(left - min(left/10, rand.N(time.Hour)+time.Minute))
		defer t.Stop()
		renew = t.C
	}
	better := make(chan *Conn)
	probing, stop := context.WithCancel(ctx)
	var probe sync.WaitGroup
	defer probe.Wait()
	defer stop()
	probe.Go(func() { k.d.probe(probing, c, better) })
	for {
		changed := k.d.Identity.Changed()
		if identityState(k.d.Identity) != was {
			return nil, k.replaceSoon(ctx, c.Enrolling())
		}
		select {
		case <-changed:
		case <-renew:
			return nil, k.replaceSoon(ctx, false)
		case <-c.DrainRequested():
			return nil, k.replaceSoon(ctx, false)
		case found := <-better:
			return found, nil
		case <-c.Done():
			stop()
			return nil, k.lost(ctx, c)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// replaceSoon returns at once for a connection that has lived for a while, and
// backs off for one that has not: a peer that drains whatever comes must not be
// dialled in a loop. granted is for one on which we waited for the certificate
// that we have now.
func (k *keeper) replaceSoon(ctx context.Context, granted bool) error {
	if granted || time.Since(k.since) >= steady {
		k.failures = 0
		return nil
	}
	k.failures++
	return k.pause(ctx, k.backoff.after(k.failures))
}

func (k *keeper) lost(ctx context.Context, c *Conn) error {
	k.current = nil
	lived := time.Since(k.since)
	k.since = time.Now()
	wait := k.backoff.first()
	if lived >= steady {
		k.failures = 0
	} else {
		k.failures++
		wait = k.backoff.after(k.failures)
	}
	k.report(c.Err(), time.Now().Add(wait))
	if ctx.Err() == nil {
		k.d.Log.Info("channel lost", "address", k.d.Addr, "peer", c.Peer().String(), "carrier", c.Carrier(), "err", c.Err(), "retry_in", wait.Round(time.Millisecond))
	}
	return k.pause(ctx, wait)
}

// pause waits for d; it ends early when our certificate changes, and forgets
// the failures then.
func (k *keeper) pause(ctx context.Context, d time.Duration) error {
	_, err := k.wait(ctx, d, nil)
	return err
}

// wait is pause, and ends early too when another connection ends or is to: left.
func (k *keeper) wait(ctx context.Context, d time.Duration, other *Conn) (left bool, err error) {
	t := time.NewTimer(d)
	defer t.Stop()
	var ended, drains <-chan struct{} // nil: never
	if other != nil {
		ended, drains = other.Done(), other.DrainRequested()
	}
	was := identityState(k.d.Identity)
	for {
		changed := k.d.Identity.Changed()
		if identityState(k.d.Identity) != was {
			k.failures = 0
			return false, nil
		}
		select {
		case <-t.C:
			return false, nil
		case <-changed:
		case <-ended:
			return true, nil
		case <-drains:
			return true, nil
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

func (k *keeper) report(err error, next time.Time) {
	if k.current != nil && k.current.Err() != nil {
		k.current = nil
	}
	if errors.Is(err, ErrReplaced) {
		err = nil
	}
	k.tell(State{Conn: k.current, Err: err, Failures: k.failures, Next: next, Since: k.since})
}

func (k *keeper) tell(s State) {
	if k.d.OnState != nil {
		k.d.OnState(s)
	}
}

// identityKey changes when another certificate is to be shown.
type identityKey struct {
	key  wire.KeyHash
	cert *tls.Certificate
	root wire.KeyHash
}

func identityState(id *identity.Identity) identityKey {
	root, _ := id.Pinned()
	cert, err := id.Certificate()
	if err != nil {
		cert = nil
	}
	return identityKey{key: id.KeyHash(), cert: cert, root: root}
}
