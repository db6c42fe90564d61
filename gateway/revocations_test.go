package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"testing"

	"sallyport/gateway/api"
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
	empty, err := d.ca.SignRevocations(t.Context(), wire.Revocations{Number: 1})
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
