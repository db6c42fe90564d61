package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// followCA names a new root of the external CA: it is trusted beside the old
// one, and that CA decides when it issues below it.
func (s *Server) followCA(ctx context.Context, ca rollable, in api.RotateCA) (api.CAChange, error) {
	sum, err := hex.DecodeString(strings.NewReplacer(":", "", "-", "").Replace(in.Fingerprint))
	switch {
	case in.What != wire.RolloverRoot:
		return api.CAChange{}, api.NewProblem(api.CodeInvalid, "only a root is named by its fingerprint")
	case err != nil || len(sum) != sha256.Size:
		return api.CAChange{}, api.NewProblem(api.CodeInvalid, fmt.Sprintf("%q is no fingerprint of a root: want %d hex digits, the SHA-256 of its certificate (`step certificate fingerprint`)", wire.Quotable(in.Fingerprint), 2*sha256.Size))
	}
	state := ca.State()
	change, err := s.rehearse(ctx, state, in.What)
	if err != nil {
		return change, err
	}
	change.Notes = append(change.Notes,
		"parties get the new list of roots at once; nobody is renewed before the external CA issues below the new root",
		"have the old root sign a certificate for the new intermediate's key too, and put it behind the intermediate in the file `crt` of step-ca: parties that are away, and open join codes, need it")
	if in.WithoutCross {
		if state.Rollover == nil {
			return change, api.NewProblem(api.CodeConflict, "name the root without --without-cross first: every party must have the new list of roots before")
		}
		if without := withoutList(change.CA); len(without) > 0 {
			return change, api.NewProblem(api.CodeConflict, fmt.Sprintf("%d parties do not have the list with the new root: %s; without the old root's word for the new intermediate they would be lost: name the root without --without-cross, wait for them (`sallyport ca show`), or remove those that are gone for good", len(without), someOf(without)))
		}
	}
	if in.DryRun {
		change.DryRun = true
		return change, nil
	}
	detail := fmt.Sprintf("root, named by its fingerprint %x, without cross %t", sum, in.WithoutCross)
	return s.turnCA(ctx, change, "ca.rotate", detail, func(ctx context.Context, atLeast int64) (wire.CAState, error) {
		return ca.Follow(ctx, sum, in.WithoutCross, atLeast)
	})
}

// withoutList are the parties that a rollover waits for, but this gateway,
// which has every list.
func withoutList(v api.CA) (out []api.CAParty) {
	for _, p := range v.Left {
		if p.Role != wire.RoleGateway {
			out = append(out, p)
		}
	}
	return out
}

// turnTick is how often a gateway looks whether another issuer issues: an
// external CA says so to the authority only.
const turnTick = 5 * time.Second

// caTurn is what was seen of the issuers last.
type caTurn struct {
	issuing wire.KeyHash
	number  int64 // of the list of roots
}

func (s *Server) turn() (t caTurn) {
	if ca, ok := s.enrolment.issuers(); ok {
		state := ca.State()
		t = caTurn{state.Issuing().Key, state.Number}
	}
	return t
}

// followTurn has everybody visited when the issuers have changed without a
// command here: an external CA has moved, or another gateway was told to.
func (s *Server) followTurn(ctx context.Context, seen *caTurn) error {
	was := *seen
	*seen = s.turn()
	if was == (caTurn{}) || was == *seen {
		return nil
	}
	s.log.InfoContext(ctx, "the issuers of the certificate authority have changed: every party is visited", "intermediate", seen.issuing.Fingerprint(), "trust", seen.number)
	s.fleet.askAll(wantPush, wire.RoleRCP, wire.RoleNode)
	if err := s.enrolment.publish(ctx, nil); err != nil {
		*seen = was
		return err
	}
	return nil
}

// awaitTurn waits, but no longer than until the issuers have changed. It is
// false when ctx has ended.
func (s *Server) awaitTurn(ctx context.Context, seen caTurn, most time.Duration) bool {
	over := time.NewTimer(most)
	defer over.Stop()
	tick := time.NewTicker(turnTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-over.C:
			return true
		case <-tick.C:
			if s.turn() != seen {
				return true
			}
		}
	}
}
