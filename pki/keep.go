package pki

import (
	"context"
	"time"
)

// How often an authority looks after what it needs.
const (
	keepTick  = time.Minute      // whether who signs for it is there, and a registration authority's own leaf
	keepTurn  = 10 * time.Second // the same, while an external CA changes its root
	doorsTick = 24 * time.Hour   // whether the intermediate for other programs has to be replaced
	signTick  = time.Hour        // whether a signer that nobody asks for anything signs: each signature is a line in its log
)

// Keep looks after what an authority needs to go on, until ctx ends: the
// intermediate for other programs ends, and so does the leaf that seals documents
// of a registration authority; an external CA may be away, or change its
// intermediate, and a signer may be away.
func (a *Authority) Keep(ctx context.Context) error {
	if a.ra != nil {
		return a.keepRegistered(ctx)
	}
	tick := time.NewTicker(keepTick)
	defer tick.Stop()
	trouble := false
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		trouble = a.watch(ctx, "the signer signs", trouble)
		if time.Since(last) >= doorsTick {
			last = time.Now()
			a.keepDoors(ctx)
		}
	}
}

func (a *Authority) keepRegistered(ctx context.Context) error {
	tick := time.NewTicker(keepTurn)
	defer tick.Stop()
	trouble := false
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if a.mat().ledger.Rollover == nil && time.Since(last) < keepTick {
			continue
		}
		last = time.Now()
		trouble = a.watch(ctx, "the external CA issues", trouble)
		a.look(ctx)
		if err := a.keepNow(ctx); err != nil && ctx.Err() == nil {
			a.log.ErrorContext(ctx, "the certificate for documents was not renewed, or does not seal the revocation set yet; it is tried again in a minute", "error", err, "not_after", a.mat().document.NotAfter)
		}
	}
}

// Reach asks an external CA whether it issues, or the signer that has the issuing
// key whether it has it, and signs, and returns why not; without them there is nobody
// to ask.
func (a *Authority) Reach(ctx context.Context) error {
	if a.ra != nil {
		ctx, cancel := context.WithTimeout(ctx, raTime)
		defer cancel()
		return a.ra.trouble.look(ctx, 0, a.ra.healthy, func(ctx context.Context) error { // what is asked for now is given to nobody
			m := a.mat()
			_, _, err := a.ra.request(ctx, m.trustDomain, m.interKey)
			return err
		})
	}
	if key, ok := a.signerOf(); ok {
		return key.client.trouble.look(ctx, signTick, key.there, key.prove)
	}
	return nil
}

// watch asks the external CA, or the signer, how it is, logs a change, and returns
// whether there is trouble; was is what it returned before. A running authority
// would notice with the next certificate only. does is what it should do.
func (a *Authority) watch(ctx context.Context, does string, was bool) bool {
	err := a.Reach(ctx)
	switch {
	case ctx.Err() != nil:
		return was
	case err != nil && !was:
		a.log.ErrorContext(ctx, does+" nothing; what is enrolled works on", "error", err)
	case err == nil && was:
		a.log.InfoContext(ctx, does+" again")
	}
	return err != nil
}
