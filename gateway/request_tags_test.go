package gateway

import (
	"maps"
	"strings"
	"testing"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/wire"
)

// Tags that an operator gives with a grant are the gateway's: they are there
// before the node is, and win over what it and its code say.
func TestGrantWithTags(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	vault := d.offlineParty(wire.RoleNode)
	q := d.imports(d.offlineFile(vault, enroll.Offer{Name: "vault", Tags: map[string]string{"site": "anywhere", "own": "yes"}}))
	for what, tags := range map[string]map[string]string{"a key that no selector names": {"a b": "c"}, "a value": {"a": "b,c"}} {
		if _, err := d.grant(t.Context(), q.ID, api.Grant{Tags: tags}); !api.Is(err, api.CodeInvalid) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := d.decideMany(t.Context(), verbGrant, api.DecideRequests{Refs: []string{q.ID}, Tags: tags}); !api.Is(err, api.CodeInvalid) {
			t.Errorf("%s, with many: %v", what, err)
		}
	}
	want := map[string]string{"site": "plant", "role": "db"}
	if _, err := d.grant(t.Context(), q.ID, api.Grant{Fingerprint: vault.Fingerprint(), Tags: want}); err != nil {
		t.Fatal(err)
	}
	has := func(id wire.ID) map[string]string {
		t.Helper()
		rows, err := d.store.NodeTags(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			if r.Source != store.TagGateway {
				t.Errorf("a tag of another source: %+v", r)
			}
		}
		return store.Effective(rows)
	}
	if got := has(vault.ID()); !maps.Equal(got, want) {
		t.Errorf("the node has %v", got)
	}
	entries, err := d.store.AuditLog(t.Context(), store.AuditFilter{})
	if err != nil {
		t.Fatal(err)
	}
	said := false
	for _, e := range entries {
		said = said || e.What == "request.grant" && strings.Contains(e.Detail, "tag role=db, tag site=plant")
	}
	if !said {
		t.Error("the audit log does not say which tags")
	}

	// The same for several at once; an RCP has none.
	one, two := d.offlineParty(wire.RoleNode), d.offlineParty(wire.RoleNode)
	refs := []string{d.imports(d.offlineFile(one, enroll.Offer{Name: "one"})).ID, d.imports(d.offlineFile(two, enroll.Offer{Name: "two"})).ID}
	if out, err := d.decideMany(t.Context(), verbGrant, api.DecideRequests{Refs: refs, Tags: want}); err != nil || out.Decided != 2 {
		t.Fatalf("%+v, %v", out, err)
	}
	for _, id := range []wire.ID{one.ID(), two.ID()} {
		if got := has(id); !maps.Equal(got, want) {
			t.Errorf("one of several has %v", got)
		}
	}
}
