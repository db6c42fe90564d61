package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

const (
	// reignEvery is how old a signed reign at an RCP may become before it is
	// brought again: the leaf that signed it lives for 14 days.
	reignEvery = 24 * time.Hour
	// maxReign bounds the answer of an RCP, in bytes.
	maxReign = 64 << 10
	// maxLeap is how far a newer generation may be above ours: each restoration
	// is one. A number that leaves no room above it would end the installation.
	maxLeap = 1 << 20
	// hopTime bounds the look at an RCP before the nodes behind it are used.
	hopTime = 5 * time.Second
)

// ErrSuperseded says that this gateway runs from an older state of its
// installation than another one. Programs exit with status 4 on it.
var ErrSuperseded = errors.New("this gateway is superseded")

// twin finds out whether this gateway is the one that goes on. A backup that
// was restored elsewhere makes two gateways of one installation; both would
// pull the nodes' events and tell them what to do. RCPs keep the newest reign
// that a gateway has signed, and the older one stops itself when it is shown
// the proof. An RCP alone can stop nobody: what it says is verified here.
type twin struct {
	s     *Server
	newer chan wire.Reign // holds the proof
}

func newTwin(s *Server) *twin { return &twin{s: s, newer: make(chan wire.Reign, 1)} }

// stopped is the error of a gateway that has seen the proof before.
func (t *twin) stopped() error {
	inst := t.s.store.Installation()
	if inst.SupersededBy == 0 {
		return nil
	}
	return superseded(inst, inst.SupersededBy, inst.SupersededAt)
}

const fixSuperseded = "if that is the one to keep, remove this one; if this one is to go on, run `sallyport backup FILE` and `sallyport restore FILE` here"

func superseded(inst store.Installation, by int64, since time.Time) error {
	return fmt.Errorf("%w; %s", whySuperseded(inst, by, since), fixSuperseded)
}

func whySuperseded(inst store.Installation, by int64, since time.Time) error {
	return fmt.Errorf("%w: it has generation %d of installation %s, and since %s generation %d is in use, restored from a backup on another host or in another directory",
		ErrSuperseded, inst.Generation, inst.UID, since.UTC().Format(time.RFC3339), by)
}

// Stopped says why a gateway that does not run will not, and what to do; nothing
// where its database does not say so.
func Stopped(ctx context.Context, database string) (why, fix string) {
	inst, err := store.SupersededAt(ctx, database)
	if err != nil || inst.SupersededBy == 0 { // what is wrong with a database is said elsewhere
		return "", ""
	}
	return whySuperseded(inst, inst.SupersededBy, inst.SupersededAt).Error(), fixSuperseded
}

// watch waits for the proof, writes it down, and ends the server with it.
func (t *twin) watch(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case newer := <-t.newer:
		inst := t.s.store.Installation()
		why := fmt.Sprintf("restored at %s, signed by gateway %s at %s", newer.RestoredAt.UTC().Format(time.RFC3339), newer.Gateway, newer.Issued.UTC().Format(time.RFC3339))
		if err := t.s.store.Supersede(context.WithoutCancel(ctx), newer.Generation, why); err != nil {
			t.s.log.Error("the end of this gateway is not written down: it will be found out again at the next start", "error", err)
		}
		return superseded(inst, newer.Generation, time.Now())
	}
}

// own is what we say of ourselves.
func (t *twin) own() wire.Reign {
	inst := t.s.store.Installation()
	return wire.Reign{TrustDomain: t.s.id.TrustDomain(), Installation: inst.UID, Generation: inst.Generation, RestoredAt: inst.RestoredAt, Name: inst.Reign,
		Gateway: t.s.id.ID(), Issued: time.Now().UTC()}
}

// hop looks at an RCP before its nodes are used: a gateway that comes back
// after its successor took over must not pull a single event. An RCP that
// cannot be asked now is asked with its next hello.
func (t *twin) hop(ctx context.Context, id wire.ID) error {
	ctx, cancel := context.WithTimeout(ctx, hopTime)
	defer cancel()
	err := t.s.sessions.Do(ctx, t.s.party(wire.RoleRCP, id), func(ctx context.Context, c *conversation) error {
		hello, _, err := c.Hello(ctx)
		if err != nil {
			return err
		}
		return t.compare(ctx, c.call, &hello)
	})
	if errors.Is(err, ErrSuperseded) {
		return err
	}
	if err != nil {
		t.s.log.Debug("reign not compared", "rcp", id, "error", err)
	}
	return nil
}

// met does the same after each verified hello.
func (t *twin) met(ctx context.Context, id wire.ID, hello *wire.Hello) error {
	if hello.Party.Role != wire.RoleRCP {
		return nil
	}
	return t.s.sessions.Do(ctx, t.s.party(wire.RoleRCP, id), func(ctx context.Context, c *conversation) error {
		return t.compare(ctx, c.call, hello)
	})
}

// compare brings an RCP our reign, or learns of a newer one.
func (t *twin) compare(ctx context.Context, call caller, hello *wire.Hello) error {
	own := t.own()
	for _, held := range hello.Reigns {
		switch {
		case held.Installation != own.Installation:
			continue
		case held.After(own.Mark()):
			var env wire.Envelope
			if err := call(ctx, http.MethodGet, wire.PathReign+own.Installation, nil, &env, maxReign); err != nil {
				return err
			}
			return t.weigh(env)
		case held.Same(own.Mark()) && own.Issued.Sub(held.Issued) < reignEvery && held.Issued.Sub(own.Issued) < reignEvery:
			return nil
		}
	}
	env, err := t.s.id.Sign(wire.TypeReign, own)
	if err != nil {
		return err
	}
	var held wire.Envelope
	if err := call(ctx, http.MethodPut, wire.PathReign, env, &held, maxReign); err != nil {
		return err
	}
	return t.weigh(held)
}

// weigh judges a proof. Only one that a gateway of our trust domain has signed,
// of our installation and after ours, ends us.
func (t *twin) weigh(env wire.Envelope) error {
	var reign wire.Reign
	signer, err := t.s.id.VerifyEnvelope(env, wire.TypeReign, wire.RoleGateway, &reign)
	if err != nil {
		return fmt.Errorf("reign that an rcp shows: %w", err)
	}
	own := t.own()
	switch {
	case signer.Party.ID != reign.Gateway, reign.TrustDomain != own.TrustDomain, reign.Installation != own.Installation:
		return fmt.Errorf("reign that an rcp shows: %s signed one of installation %q, gateway %q", signer, wire.Quotable(reign.Installation), wire.Quotable(string(reign.Gateway)))
	case !reign.After(own):
		return nil
	case reign.Generation > own.Generation+maxLeap:
		return fmt.Errorf("reign that an rcp shows: generation %d is beyond all that restorations could have made of %d: it is ignored; find out who holds the key of gateway %s", reign.Generation, own.Generation, reign.Gateway)
	}
	select {
	case t.newer <- reign:
	default:
	}
	return superseded(t.s.store.Installation(), reign.Generation, reign.RestoredAt)
}
