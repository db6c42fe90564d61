package identity_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// TestVerifiedSignaturesProveNothingElse: a chain whose signatures were good once
// is refused when its time is over, when another has its names, and when its key
// is revoked; and it is known again when others came between.
func TestVerifiedSignaturesProveNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, impostor := identitytest.NewCA(t), identitytest.NewCA(t)
		node := ca.Party(t, wire.RoleNode)
		verify := func(by *identity.Identity) error {
			env, err := by.Sign(wire.TypeDesired, wire.Desired{Node: node.ID()})
			if err != nil {
				t.Fatal(err)
			}
			var got wire.Desired
			_, err = node.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, &got)
			return err
		}
		short, long := ca.Party(t, wire.RoleGateway, identitytest.NotAfter(time.Now().Add(time.Hour))), ca.Party(t, wire.RoleGateway)
		for range 2 {
			for _, gw := range []*identity.Identity{short, long, ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleGateway), ca.Party(t, wire.RoleGateway)} {
				for range 2 {
					if err := verify(gw); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if err := verify(impostor.Party(t, wire.RoleGateway)); !errors.Is(err, identity.ErrUntrusted) {
			t.Errorf("a gateway of another authority: %v", err)
		}
		if err := errors.Join(verify(short), verify(long)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		if err := verify(short); !errors.Is(err, identity.ErrExpired) {
			t.Errorf("after its end: %v", err)
		}
		if _, err := node.ApplyRevocations(ca.Revoke(t, 1, long.KeyHash())); err != nil {
			t.Fatal(err)
		}
		if err := verify(long); !errors.Is(err, identity.ErrRevoked) {
			t.Errorf("after its revocation: %v", err)
		}
	})
}
