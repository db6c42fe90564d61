package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// TestAnRCPOffersAnotherSet: what an RCP shows is taken only if the authority
// signed it, and only if it is newer, whatever number its hello claims.
func TestAnRCPOffersAnotherSet(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	victim := d.enrolled(d.join(api.CreateJoin{}), "victim")
	n, err := d.store.Node(t.Context(), victim.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	empty, err := d.ca.SignRevocations(t.Context(), wire.Revocations{Number: 1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	number, err := d.revokeNode(t.Context(), n, false)
	if err != nil {
		t.Fatal(err)
	}
	if !d.id.Revoked(victim.id.KeyHash()) || number < 1 {
		t.Fatalf("not revoked in set %d", number)
	}
	forged := wire.Revocations{TrustDomain: d.id.TrustDomain(), Number: number + 100}
	byRCP, err := d.ca.Party(t, wire.RoleRCP).Sign(wire.TypeRevocations, forged)
	if err != nil {
		t.Fatal(err)
	}
	changed := empty
	changed.Payload, _ = json.Marshal(forged)
	for name, c := range map[string]struct {
		env  wire.Envelope
		want error
	}{"older": {empty, identity.ErrOlder}, "its own": {byRCP, nil}, "changed": {changed, identity.ErrSignature}} {
		offered := false
		d.talk = func(_ context.Context, _ wire.Party, f func(context.Context, caller) error) error {
			return f(t.Context(), func(_ context.Context, method, path string, _, out any, _ int64) error {
				if method != http.MethodGet || path != wire.PathRevocations {
					return errors.New("not in this test")
				}
				offered = true
				*out.(*wire.Envelope) = c.env
				return nil
			})
		}
		hello := &wire.Hello{Party: wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}, Revocations: number + 100}
		err := d.deliverRevocations(t.Context(), hello.Party.ID, hello)
		if err == nil || !offered || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v (offered: %v)", name, err, offered)
		}
		if now, _ := d.id.Revocations(); now != number || !d.id.Revoked(victim.id.KeyHash()) {
			t.Errorf("%s: set %d took the place of %d", name, now, number)
		}
	}
}

// othersCA is an authority that works for another gateway too, which has a set
// signed when this one is about to.
type othersCA struct {
	*memoryCA
	other func() // once
}

func (c *othersCA) SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	if f := c.other; f != nil {
		c.other = nil
		f()
	}
	return c.memoryCA.SignRevocations(ctx, set, after)
}

// TestRevocationsOfAnotherGateway: what one gateway of an authority revoked stays
// revoked in the set of the next, also when both revoke at once.
func TestRevocationsOfAnotherGateway(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	keys := [3]wire.KeyHash{}
	for i := range keys {
		keys[i] = d.ca.Party(t, wire.RoleNode).KeyHash()
	}
	sign := func(number int64, keys ...wire.KeyHash) {
		t.Helper()
		set := wire.Revocations{Number: number}
		for _, k := range keys {
			set.Revoked = append(set.Revoked, wire.Revocation{Key: k, Role: wire.RoleNode, ID: wire.NewID(), At: time.Now()})
		}
		if _, err := d.ca.SignRevocations(t.Context(), set, number-1); err != nil {
			t.Fatal(err)
		}
	}
	sign(1, keys[0], keys[1])
	d.enrolment.ca = &othersCA{memoryCA: d.ca, other: func() { sign(2, keys[:]...) }}
	victim := d.enrolled(d.join(api.CreateJoin{}), "victim")
	n, err := d.store.Node(t.Context(), victim.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	number, err := d.revokeNode(t.Context(), n, false)
	if err != nil || number < 3 {
		t.Errorf("revoked in set %d, %v", number, err)
	}
	for i, k := range append(keys[:], victim.id.KeyHash()) {
		if !d.id.Revoked(k) {
			t.Errorf("key %d is good again in set %d", i, number)
		}
	}
}

// restoredCA is an authority that was restored from an older copy.
type restoredCA struct {
	*memoryCA
	behind bool
}

func (c *restoredCA) Behind() bool { return c.behind }

func (c *restoredCA) SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	c.behind = false
	return c.memoryCA.SignRevocations(ctx, set, after)
}

// TestAuthorityLostTheLastSet: it has the next one signed at once, although there
// is nobody new in it.
func TestAuthorityLostTheLastSet(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	victim := d.enrolled(d.join(api.CreateJoin{}), "victim")
	n, err := d.store.Node(t.Context(), victim.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	before, err := d.revokeNode(t.Context(), n, false)
	if err != nil {
		t.Fatal(err)
	}
	ca := &restoredCA{d.ca, true}
	d.enrolment.ca = ca
	for range 2 { // once
		if err := d.publish(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if now, _ := d.id.Revocations(); now != before+1 || ca.behind || !d.id.Revoked(victim.id.KeyHash()) {
		t.Errorf("set %d after %d", now, before)
	}
}

// overtakenCA signs another set at once, which this gateway takes over first.
type overtakenCA struct {
	*memoryCA
	take func(wire.Envelope)
}

func (c *overtakenCA) SignRevocations(ctx context.Context, set wire.Revocations, after int64) (wire.Envelope, error) {
	env, err := c.memoryCA.SignRevocations(ctx, set, after)
	if err != nil {
		return env, err
	}
	after = set.Number
	set.Number++
	next, err := c.memoryCA.SignRevocations(ctx, set, after)
	if err == nil {
		c.take(next)
	}
	return env, err
}

// TestTwoRevocationsAtOnce: the set of the later one names the keys of both, and
// may be taken over before that of the first.
func TestTwoRevocationsAtOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.enrolment.ca = &overtakenCA{d.ca, func(env wire.Envelope) {
		if _, err := d.id.ApplyRevocations(env); err != nil {
			t.Error(err)
		}
	}}
	victim := d.enrolled(d.join(api.CreateJoin{}), "victim")
	n, err := d.store.Node(t.Context(), victim.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); err != nil || !d.id.Revoked(victim.id.KeyHash()) {
		t.Errorf("revoked %v, %v", d.id.Revoked(victim.id.KeyHash()), err)
	}
}

// refreshedCA is an authority whose set is asked for anew between two looks.
type refreshedCA struct {
	*memoryCA
	looks, at int
	other     func()
}

func (c *refreshedCA) Revocations() (wire.Envelope, bool) {
	if c.looks++; c.looks == c.at {
		c.other()
	}
	return c.memoryCA.Revocations()
}

// TestSetOfAnotherGatewayThatComesInBetween: it comes after the merge, and before
// ours is made.
func TestSetOfAnotherGatewayThatComesInBetween(t *testing.T) {
	t.Parallel()
	for at := range 4 {
		d := newDesk(t)
		key := d.ca.Party(t, wire.RoleNode).KeyHash()
		ca := &refreshedCA{memoryCA: d.ca, other: func() {
			var set wire.Revocations
			if env, ok := d.ca.Revocations(); ok {
				if err := json.Unmarshal(env.Payload, &set); err != nil {
					t.Error(err)
				}
			}
			after := set.Number
			set.Number++
			set.Revoked = append(set.Revoked, wire.Revocation{Key: key, Role: wire.RoleNode, ID: wire.NewID(), At: time.Now()})
			if _, err := d.ca.SignRevocations(t.Context(), set, after); err != nil {
				t.Error(err)
			}
		}}
		d.enrolment.ca = ca
		victim := d.enrolled(d.join(api.CreateJoin{}), "victim")
		n, err := d.store.Node(t.Context(), victim.id.ID())
		if err != nil {
			t.Fatal(err)
		}
		ca.at = ca.looks + 1 + at
		if _, err := d.revokeNode(t.Context(), n, false); err != nil && !errors.Is(err, identity.ErrOlder) {
			t.Errorf("look %d: %v", at, err)
		}
		if err := d.publish(t.Context(), nil); err != nil { // as each minute
			t.Errorf("look %d: %v", at, err)
		}
		if ca.looks < ca.at || !d.id.Revoked(key) || !d.id.Revoked(victim.id.KeyHash()) {
			t.Errorf("look %d of %d: revoked are the other gateway's %v, ours %v", at, ca.looks, d.id.Revoked(key), d.id.Revoked(victim.id.KeyHash()))
		}
	}
}

// TestRestoredGatewayGivesNoKeyBack: a backup knows nothing of a revocation
// after it, and the restored gateway signs sets of its own before it meets the
// RCP that does. Both count on from the same number (PK-11, HA-07).
func TestRestoredGatewayGivesNoKeyBack(t *testing.T) {
	t.Parallel()
	for name, revoked := range map[string]int{"the RCP's number is higher": 0, "the numbers are the same": 1, "ours is higher": 2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			d.restored()
			victim := wire.KeyHash(strings.Repeat("cd", 32))
			held := d.ca.Revoke(t, 1, victim)
			var ours []wire.KeyHash
			for i := range revoked {
				ours = append(ours, d.revoked(fmt.Sprintf("web-%d", i)))
			}
			rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
			asked := 0
			d.answer = func(_ wire.Party, method, _ string, in, out any) error {
				switch method {
				case http.MethodGet:
					asked++
					*out.(*wire.Envelope) = held
				case http.MethodPut:
					held = in.(wire.Envelope)
				}
				return nil
			}
			for range 2 {
				if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: numberOf(held)}); err != nil {
					t.Fatal(err)
				}
			}
			if asked != 1 {
				t.Errorf("the RCP was asked %d times for its set", asked)
			}
			if number, _ := d.id.Revocations(); revoked > 0 && numberOf(held) != number {
				t.Errorf("the RCP holds set %d, and ours is %d", numberOf(held), number)
			}
			for _, key := range append(ours, victim) {
				if !d.id.Revoked(key) || !names(t, held, key) {
					t.Errorf("key %.8s: revoked here %v, at the RCP %v", key, d.id.Revoked(key), names(t, held, key))
				}
			}
		})
	}
}

// TestGivenUpIntermediateRevokesNobody: who has the key of an intermediate that was
// given up, and an RCP, gets nothing into a restored gateway's set.
func TestGivenUpIntermediateRevokesNobody(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.restored()
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	forged := d.ca.Revoke(t, 1, a.id.KeyHash())
	given := d.ca.Seal(t, wire.TypeRevocations, wire.Revocations{TrustDomain: d.ca.TrustDomain, Number: 7,
		Revoked: []wire.Revocation{{Key: wire.KeyOf(d.ca.Inter), Role: rolePKI, At: time.Now().UTC()}}})
	if _, err := d.id.ApplyRevocations(given); err != nil {
		t.Fatal(err)
	}
	rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
	d.answer = func(_ wire.Party, method, _ string, _, out any) error {
		if method == http.MethodGet {
			*out.(*wire.Envelope) = forged
		}
		return nil
	}
	if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 1}); err != nil {
		t.Fatal(err)
	}
	if keys, err := d.store.RevokedKeys(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("revoked: %+v, %v", keys, err)
	}
}

// TestSetThatIsNotReadIsReadAgain: before what an RCP holds is merged it is brought
// nothing, whoever's number is the higher one.
func TestSetThatIsNotReadIsReadAgain(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.restored()
	victim := wire.KeyHash(strings.Repeat("cd", 32))
	held := d.ca.Revoke(t, 5, victim)
	rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
	away := true
	d.answer = func(p wire.Party, method, _ string, in, out any) error {
		switch {
		case p.ID != rcp.ID: // the node that is told of its end
		case method == http.MethodPut:
			held = in.(wire.Envelope)
		case away:
			return errors.New("cut")
		default:
			*out.(*wire.Envelope) = held
		}
		return nil
	}
	hello := &wire.Hello{Party: rcp, Revocations: 5}
	if err := d.deliverRevocations(t.Context(), rcp.ID, hello); err == nil || d.heardOut(rcp.ID) {
		t.Fatalf("%v, heard %v", err, d.heardOut(rcp.ID))
	}
	ours := d.revoked("web")
	away = false
	if err := d.deliverRevocations(t.Context(), rcp.ID, hello); err != nil || !d.heardOut(rcp.ID) {
		t.Fatalf("%v, heard %v", err, d.heardOut(rcp.ID))
	}
	for _, key := range []wire.KeyHash{victim, ours} {
		if !d.id.Revoked(key) || !names(t, held, key) {
			t.Errorf("key %.8s: revoked here %v, at the RCP %v", key, d.id.Revoked(key), names(t, held, key))
		}
	}
}

// TestHigherSetTakesNothingOutOfForce: a genuine set with a higher number that
// lacks what was revoked here is followed by one that names all.
func TestHigherSetTakesNothingOutOfForce(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ours := d.revoked("web")
	rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
	held := d.ca.Revoke(t, 9)
	d.answer = func(_ wire.Party, method, _ string, _, out any) error {
		if method == http.MethodGet {
			*out.(*wire.Envelope) = held
		}
		return nil
	}
	if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 9}); err != nil {
		t.Fatal(err)
	}
	if number, _ := d.id.Revocations(); number != 10 || !d.id.Revoked(ours) {
		t.Errorf("set %d, revoked %v", number, d.id.Revoked(ours))
	}
	if err := d.publish(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if number, _ := d.id.Revocations(); number != 10 {
		t.Errorf("signed once more: %d", number)
	}
}

// TestSetsOfOneNumberBecomeOne: an RCP whose set has our number and names less
// gets ours under the next number.
func TestSetsOfOneNumberBecomeOne(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	d.restored()
	first := d.revoked("web-1")
	held := d.ca.Revoke(t, 2, first)
	second := d.revoked("web-2")
	rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
	d.answer = func(_ wire.Party, method, _ string, in, out any) error {
		if method == http.MethodGet {
			*out.(*wire.Envelope) = held
		} else {
			held = in.(wire.Envelope)
		}
		return nil
	}
	if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 2}); err != nil {
		t.Fatal(err)
	}
	if numberOf(held) != 3 || !names(t, held, first) || !names(t, held, second) {
		t.Errorf("the RCP holds set %d: %s", numberOf(held), held.Payload)
	}
	if err := d.publish(t.Context(), nil); err != nil || numberOf(held) != 3 {
		t.Errorf("signed once more: %v", err)
	}
}

// TestRekeyedNodeOutlivesARestoration: the key that the backup knows was
// replaced after it. The set says so, and the node lives on with its new one,
// which a revocation of the node then names (HA-07, PK-10).
func TestRekeyedNodeOutlivesARestoration(t *testing.T) {
	t.Parallel()
	second, third := wire.KeyHash(strings.Repeat("22", 32)), wire.KeyHash(strings.Repeat("33", 32))
	for name, c := range map[string]struct {
		reasons []string // of the node's key, and of those after it
		now     wire.KeyHash
	}{
		"once":             {[]string{replacedBy + second.Fingerprint()}, second},
		"twice":            {[]string{replacedBy + second.Fingerprint(), replacedBy + third.Fingerprint()}, third},
		"and then revoked": {[]string{replacedBy + second.Fingerprint(), "by root"}, ""},
		"by another party": {[]string{replacedBy + string(wire.NewID())}, ""},
		"in a circle":      {[]string{replacedBy + second.Fingerprint(), replacedBy + second.Fingerprint()}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(t)
			a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
			set := wire.Revocations{TrustDomain: d.id.TrustDomain(), Number: 5}
			for i, key := range []wire.KeyHash{a.id.KeyHash(), second}[:len(c.reasons)] {
				set.Revoked = append(set.Revoked, wire.Revocation{Key: key, Role: wire.RoleNode, ID: a.id.ID(), At: time.Now().UTC(), Reason: c.reasons[i]})
			}
			held := d.ca.Seal(t, wire.TypeRevocations, set)
			d.answer = func(_ wire.Party, method, _ string, _, out any) error {
				if method == http.MethodGet {
					*out.(*wire.Envelope) = held
				}
				return nil
			}
			d.changes = nil
			rcp := wire.Party{Role: wire.RoleRCP, ID: wire.NewID(), TrustDomain: d.id.TrustDomain()}
			if err := d.deliverRevocations(t.Context(), rcp.ID, &wire.Hello{Party: rcp, Revocations: 5}); err != nil {
				t.Fatal(err)
			}
			n, err := d.store.Node(t.Context(), a.id.ID())
			if err != nil {
				t.Fatal(err)
			}
			if c.now == "" {
				if n.State != wire.StateRevoked || !slices.Contains(d.changes, n.ID) {
					t.Errorf("state %s: %s; told %v", n.State, n.StateReason, d.changes)
				}
				return
			}
			if n.State == wire.StateRevoked || n.KeyHash != c.now || d.id.Revoked(c.now) {
				t.Fatalf("state %s (%s), key %.8s, want %.8s", n.State, n.StateReason, n.KeyHash, c.now)
			}
			if _, err := d.revokeNode(t.Context(), n, false); err != nil || !d.id.Revoked(c.now) {
				t.Errorf("the new key is not revoked with the node: %v", err)
			}
		})
	}
}

// TestIssuerThatWasGivenUpIsNamed: an authority from before the end of a
// rollover certifies what nobody takes, and no party can tell it why.
func TestIssuerThatWasGivenUpIsNamed(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca := d.rolls()
	var said bytes.Buffer
	d.log = slog.New(slog.NewTextHandler(&said, nil))
	if err := d.start(t.Context()); err != nil || said.Len() > 0 || d.issuerProblem() != "" {
		t.Fatalf("%v: %s", err, said.String())
	}
	later := d.ca.Seal(t, wire.TypeRevocations, wire.Revocations{TrustDomain: d.ca.TrustDomain, Number: 7,
		Revoked: []wire.Revocation{{Key: ca.state.Issuing().Key, Role: rolePKI, At: time.Now().UTC()}}})
	d.ca.env = &later // a restoration keeps the newer set
	if err := d.start(t.Context()); err != nil || !strings.Contains(said.String(), "ca rotate intermediate") {
		t.Errorf("%v: %q", err, said.String())
	}
	s := &Server{store: d.store, id: d.id, enrolment: d.enrolment}
	if c := s.checkAuthority(t.Context()); c.OK || !strings.Contains(c.Detail, "stands in the revocation set") || !strings.Contains(c.Fix, "ca rotate intermediate") {
		t.Errorf("the doctor finds %+v", c)
	}
	if err := s.tellConcerns(t.Context(), map[string]wire.Severity{}); err != nil {
		t.Fatal(err)
	}
	events, err := d.store.Events(t.Context(), store.EventFilter{Own: true, Key: keyCA + "issuer", State: api.EventOpen, Limit: 10})
	if err != nil || len(events) != 1 || events[0].Severity != wire.SeverityCritical {
		t.Errorf("events %+v, %v", events, err)
	}
}

// restored has the database begin a new generation, as a restoration does.
func (d *desk) restored() {
	d.t.Helper()
	if err := d.store.RaiseGeneration(d.t.Context(), 0); err != nil {
		d.t.Fatal(err)
	}
}

// revoked enrols a node, revokes it, and returns its key.
func (d *desk) revoked(name string) wire.KeyHash {
	d.t.Helper()
	a := d.enrolled(d.join(api.CreateJoin{Name: name}), "")
	n, err := d.store.Node(d.t.Context(), a.id.ID())
	if err != nil {
		d.t.Fatal(err)
	}
	if _, err := d.revokeNode(d.t.Context(), n, false); err != nil {
		d.t.Fatal(err)
	}
	return a.id.KeyHash()
}

// names tells whether a set names a key.
func names(t *testing.T, env wire.Envelope, key wire.KeyHash) bool {
	t.Helper()
	var set wire.Revocations
	if err := json.Unmarshal(env.Payload, &set); err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(set.Revoked, func(r wire.Revocation) bool { return r.Key == key })
}
