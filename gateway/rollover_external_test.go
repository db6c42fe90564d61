package gateway

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// followingCA is a registration authority, as the gateway sees it.
type followingCA struct {
	*rollingCA

	turning sync.Mutex
	named   []string
}

func (c *followingCA) State() wire.CAState {
	c.turning.Lock()
	defer c.turning.Unlock()
	return c.state
}

func (c *followingCA) Follow(_ context.Context, root []byte, alone bool, _ int64) (wire.CAState, error) {
	c.turning.Lock()
	defer c.turning.Unlock()
	c.named = append(c.named, strings.ToUpper(string(root[:1])))
	if alone {
		c.named = append(c.named, "alone")
	}
	c.state.Number = 7
	c.state.Rollover = &wire.CARollover{Kind: wire.RolloverRoot, From: c.state.Issuing().Key, To: c.state.Issuing().Key, Since: time.Now(), Named: true}
	return c.state, nil
}

// The root of an external CA is named by its fingerprint; it may issue without
// the old root's word only when every party has the list of roots that has it.
func TestExternalRootIsNamed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ca := &followingCA{rollingCA: &rollingCA{memoryCA: &memoryCA{CA: w.ca, t: t}, state: wire.CAState{TrustDomain: w.ca.TrustDomain, External: "https://ca.example",
		Roots:         []wire.CAIssuer{{N: 1, Key: wire.KeyOf(w.ca.Root), State: wire.IssuerIssuing}},
		Intermediates: []wire.CAIssuer{{N: 1, Root: 1, Key: wire.KeyOf(w.ca.Inter), State: wire.IssuerIssuing}}}}}
	node := wire.Party{Role: wire.RoleNode, ID: wire.NewID(), TrustDomain: w.ca.TrustDomain}
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddNode(ctx, &store.Node{ID: node.ID, Tenant: wire.DefaultTenant, Name: "web", State: wire.StatePending, KeyHash: wire.HashSPKI([]byte("web"))})
	})
	w.serveAPI(false)
	w.before = func(s *Server) { s.enrolment.ca = ca }
	w.run()
	c := w.client()
	sum := strings.Repeat("41", 32)
	refused := func(what string, in api.RotateCA, text string) {
		t.Helper()
		if _, err := c.RotateCA(t.Context(), in); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("half a fingerprint", api.RotateCA{What: wire.RolloverRoot, Fingerprint: sum[2:]}, "64 hex digits")
	refused("an intermediate", api.RotateCA{What: wire.RolloverIntermediate, Fingerprint: sum}, "only a root")
	refused("in one step", api.RotateCA{What: wire.RolloverRoot, Fingerprint: sum, WithoutCross: true}, "first")
	if _, err := c.RotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot, Fingerprint: sum, DryRun: true}); err != nil || len(ca.named) != 0 {
		t.Fatalf("rehearsal: %v, %v", ca.named, err)
	}
	change, err := c.RotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot, Fingerprint: strings.ToLower("41:" + sum[2:])})
	if err != nil || len(ca.named) != 1 || ca.named[0] != "A" {
		t.Fatalf("%v, %v", ca.named, err)
	}
	if v := change.CA; v.External == "" || v.Rollover == nil || !v.Rollover.Named || len(v.Left) != 1 || v.Left[0].ID != node.ID {
		t.Errorf("%+v", v)
	}
	refused("while a node is left", api.RotateCA{What: wire.RolloverRoot, Fingerprint: sum, WithoutCross: true}, "node web")
	if _, err := c.FinishCA(t.Context(), api.FinishCA{Force: true}); err == nil || !strings.Contains(err.Error(), "old root") {
		t.Errorf("finished while the old root issues: %v", err)
	}
	w.update(func(ctx context.Context, tx *store.Tx) error { return tx.SetTrust(ctx, node, 7) })
	if _, err := c.RotateCA(t.Context(), api.RotateCA{What: wire.RolloverRoot, Fingerprint: sum, WithoutCross: true}); err != nil || len(ca.named) != 3 {
		t.Errorf("when it has the list: %v, %v", ca.named, err)
	}
}
