package gateway

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/enroll"
	"sallyport/internal/wire"
)

func (d *desk) rules(text string, dryRun bool) api.AppliedRules {
	d.t.Helper()
	out, err := d.applyRules(d.t.Context(), api.ApplyRules{Manifests: []api.Manifest{{File: "rules.yaml", Text: text}}, DryRun: dryRun})
	if err != nil {
		d.t.Fatal(err)
	}
	return out
}

// from shows the party to the gateway as an RCP reports it.
func (d *desk) from(a *applicant, rcp, source string) {
	d.t.Helper()
	d.pending(d.t.Context(), a.id.KeyHash(), pendingAt{Name: rcp, Peer: wire.Peer{Pending: a.id.KeyHash(), Source: source, Since: time.Now()}})
}

// TestRuleKnowsAnRCPBehindAnother: the one where the party waits, if the operator
// put it behind the one that says so.
func TestRuleKnowsAnRCPBehindAnother(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Uses: 10})
	d.rules(fmt.Sprintf("kind: rule\nname: plant\njoins: [%s]\nrcps: [edge]\n", mustParse(t, code).TokenID), false)
	ids := map[string]wire.ID{}
	for _, r := range []store.RCP{{Name: "dmz"}, {Name: "other"}, {Name: "middle", Via: "dmz"}, {Name: "edge", Via: "middle"}} {
		r.PartyID, r.State = wire.NewID(), api.RCPConnected
		ids[r.Name] = r.PartyID
		if err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.AddRCP(ctx, &r) }); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name, first, rcp string
		path             []wire.ID
	}{
		{"web-1", "dmz", "edge", []wire.ID{ids["middle"], ids["edge"]}},
		{"web-2", "other", "other", []wire.ID{ids["middle"], ids["edge"]}},
		{"web-3", "dmz", "middle", []wire.ID{ids["middle"]}},
		{"web-4", "dmz", "dmz", []wire.ID{wire.NewID()}},
		{"web-5", "dmz", "dmz", nil},
	} {
		a := d.party(wire.RoleNode, code, tc.name)
		key := a.id.KeyHash()
		d.pending(t.Context(), key, pendingAt{Name: tc.first, Peer: wire.Peer{Pending: key, Path: tc.path, Source: "10.7.0.1:4000", Since: time.Now()}})
		q, err := d.store.LastRequest(t.Context(), key)
		if err != nil || q.RCP != tc.rcp || (q.Rule == "plant") != (tc.rcp == "edge") {
			t.Errorf("%s by way of %s: request %+v, %v; want it at %s", tc.name, tc.first, q, err, tc.rcp)
		}
	}
}

// TestRuleKnowsEveryRCPWhereAPartyWaits: by which of them the gateway looks at it
// first is chance.
func TestRuleKnowsEveryRCPWhereAPartyWaits(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Uses: 10})
	rule := fmt.Sprintf("kind: rule\nname: plant\njoins: [%s]\nrcps: [edge]\ncidrs: [10.7.0.0/16]\n", mustParse(t, code).TokenID)
	d.rules(rule, false)
	dmz, edge := &store.RCP{Name: "dmz", PartyID: wire.NewID()}, &store.RCP{Name: "edge", PartyID: wire.NewID()}
	at := func(a *applicant, r *store.RCP, source string) pendingAt {
		return pendingAt{Link: r.PartyID, Name: r.Name, Peer: wire.Peer{Pending: a.id.KeyHash(), Source: source, Since: time.Now()}}
	}
	waits := map[wire.KeyHash][]pendingAt{}
	d.ways = func(key wire.KeyHash) []pendingAt { return slices.Clone(waits[key]) }
	request := func(a *applicant) *store.Request {
		t.Helper()
		q, err := d.store.LastRequest(t.Context(), a.id.KeyHash())
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	a := d.party(wire.RoleNode, code, "web-1")
	waits[a.id.KeyHash()] = []pendingAt{at(a, edge, "10.7.0.1:4000"), at(a, dmz, "192.0.2.7:4000")}
	d.pending(t.Context(), a.id.KeyHash(), waits[a.id.KeyHash()][1])
	d.expect(a, enroll.StateEnrolled, "")
	if q := request(a); q.Rule != "plant" || q.RCP != "edge" || q.Source != "10.7.0.1:4000" {
		t.Errorf("request %+v; want it by the rule, at the RCP that this names", q)
	}

	// What one RCP says of the address does not count for another one.
	b := d.party(wire.RoleNode, code, "web-2")
	waits[b.id.KeyHash()] = []pendingAt{at(b, edge, "192.0.2.8:4000"), at(b, dmz, "10.7.0.2:4000")}
	d.pending(t.Context(), b.id.KeyHash(), waits[b.id.KeyHash()][1])
	d.expect(b, enroll.StateWaiting, wire.EnrollNoRule)
	if out := d.rules(rule, true); len(out.Grants) != 1 || out.Grants[0].Why == "" {
		t.Errorf("dry run of the rule as it is: %+v", out.Grants)
	}
	if out := d.rules(strings.Replace(rule, "10.7", "192.0", 1), true); len(out.Grants) != 1 || out.Grants[0].Why != "" {
		t.Errorf("dry run of a rule that takes it from there: %+v", out.Grants)
	}
}

// TestRuleLetsAFileInWhoseCodeWasShown: a party waits with a code, and its request
// comes by a file then, which names none.
func TestRuleLetsAFileInWhoseCodeWasShown(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Uses: 2})
	rule := "kind: rule\nname: dbs\njoins: [" + mustParse(t, code).TokenID + "]\nnames: [%s]\n"
	d.rules(fmt.Sprintf(rule, "db"), false)
	a := d.party(wire.RoleNode, code, "wish")
	d.see(a)
	if q := d.imports(d.offlineFile(a.id, enroll.Offer{Name: "wish", Program: "test"})); q.State != api.RequestPending {
		t.Fatalf("imported: %s, %s", q.State, q.Reason)
	}
	if out := d.rules(fmt.Sprintf(rule, "wish"), false); len(out.Grants) != 1 || out.Grants[0].Why != "" {
		t.Errorf("grants %+v", out.Grants)
	}
	if q, err := d.store.LastRequest(t.Context(), a.id.KeyHash()); err != nil || q.State != api.RequestGranted {
		t.Errorf("request %+v, %v", q, err)
	}
}

// A rule that names a join code narrows it: its token alone does not do any more.
func TestRuleNarrowsAToken(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	code := d.join(api.CreateJoin{Uses: 10, Tags: map[string]string{"site": "plant"}})
	text := fmt.Sprintf("kind: rule\nname: plant\njoins: [%s]\ncidrs: [10.7.0.0/16, '2001:db8::/32']\nrcps: [edge]\nnames: ['web-*']\ntags: site=plant\nset: {tier: gold, site: other}\nallow: [env=*]\n", mustParse(t, code).TokenID)
	d.rules(text, false)
	for _, tc := range []struct{ name, rcp, source, against string }{
		{"web-1", "edge", "10.8.0.1:4000", "outside its networks"},
		{"web-2", "edge", "nonsense", "outside its networks"},
		{"web-3", "dmz", "10.7.0.1:4000", "RCPs"},
		{"db-1", "edge", "10.7.0.1:4000", "name"},
		{"web-4", "edge", "10.7.3.4:4000", ""},
		{"web-5", "edge", "[2001:db8::7]:4000", ""},
		{"web-6", "edge", "::ffff:10.7.0.9", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := d.party(wire.RoleNode, code, tc.name)
			d.from(a, tc.rcp, tc.source)
			if tc.against != "" {
				d.expect(a, enroll.StateWaiting, wire.EnrollNoRule)
				if s := a.Status(); !strings.Contains(s.Reason, tc.against) {
					t.Errorf("reason %q, want %q in it", s.Reason, tc.against)
				}
				return
			}
			d.expect(a, enroll.StateEnrolled, "")
			q, err := d.store.LastRequest(t.Context(), a.id.KeyHash())
			if err != nil || q.Rule != "plant" {
				t.Errorf("request %+v %v", q, err)
			}
			n, err := d.store.Node(t.Context(), a.id.ID())
			if err != nil || len(n.AllowTags) != 1 {
				t.Errorf("node %+v %v", n, err)
			}
			rows, err := d.store.NodeTags(t.Context(), a.id.ID())
			if tags := store.Effective(rows); err != nil || tags["tier"] != "gold" || tags["site"] != "other" {
				t.Errorf("tags %v %v", tags, err)
			}
		})
	}
	if rules, err := d.store.Rules(t.Context(), store.DefaultTenant); err != nil || rules[0].Granted != 3 {
		t.Errorf("rules %+v %v", rules, err)
	}
	// A dry run says who would get in, and changes nothing.
	wider := strings.Replace(text, "10.7.0.0/16", "10.0.0.0/8", 1)
	dry := d.rules(wider, true)
	granted := map[string]string{}
	for _, g := range dry.Grants {
		granted[g.Request.Name] = g.Rule
	}
	if len(dry.Grants) != 4 || granted["web-1"] != "plant" || granted["db-1"] != "" || dry.Objects[0].Change != "changed" {
		t.Errorf("dry run %+v", dry)
	}
	if n := len(d.requests(api.RequestPending)); n != 4 || d.audited("rule.apply") != 1 {
		t.Errorf("the dry run changed something: %d wait", n)
	}
	d.mu.Lock()
	d.looked = nil
	d.mu.Unlock()
	d.rules(wider, false)
	if len(d.looked) != 1 {
		t.Errorf("%d waiting parties were looked at, want the one that the rule lets in", len(d.looked))
	}
	for key, a := range d.parties {
		if q, err := d.store.LastRequest(t.Context(), key); err == nil && q.Name == "web-1" {
			d.from(a, "edge", "10.8.0.1:4000")
			d.expect(a, enroll.StateEnrolled, "")
		}
	}
	// Without the rule the token does again, for those who wait too.
	d.mu.Lock()
	d.looked = nil
	d.mu.Unlock()
	if err := d.deleteRule(t.Context(), "plant"); err != nil {
		t.Fatal(err)
	}
	if err := d.deleteRule(t.Context(), "plant"); !api.Is(err, api.CodeNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	if len(d.looked) != 3 {
		t.Errorf("%d waiting parties were looked at, want the three that no rule let in", len(d.looked))
	}
	a := d.party(wire.RoleNode, code, "db-9")
	d.from(a, "dmz", "192.0.2.1:1")
	d.expect(a, enroll.StateEnrolled, "")
}

// What a dry run promises is what the parties get when they are looked at: a
// name, and the last use of a code, go to one of those that wait for them.
func TestRuleRehearsalSharesOut(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	many, twice, gone := d.join(api.CreateJoin{Uses: 10}), d.join(api.CreateJoin{Uses: 2}), d.join(api.CreateJoin{Uses: 10})
	d.enrolled(d.join(api.CreateJoin{Name: "old"}), "")
	again := d.join(api.CreateJoin{Name: "old", Replace: true})
	text := fmt.Sprintf("kind: rule\nname: plant\njoins: [%s, %s, %s, %s]\n", mustParse(t, many).TokenID, mustParse(t, twice).TokenID, mustParse(t, gone).TokenID, mustParse(t, again).TokenID)
	d.rules(text+"names: [none]\n", false)
	var waiting []*applicant
	for _, w := range []struct{ code, name string }{
		{many, "web-1"}, {many, "web-1"}, {twice, "db-1"}, {twice, "db-2"}, {twice, "db-3"}, {gone, "late"}, {again, ""},
	} {
		a := d.party(wire.RoleNode, w.code, w.name)
		d.from(a, "edge", "10.7.0.1:4000")
		d.expect(a, enroll.StateWaiting, wire.EnrollNoRule)
		waiting = append(waiting, a)
	}
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error { return tx.RevokeJoin(ctx, mustParse(t, gone).TokenID) })
	if err != nil {
		t.Fatal(err)
	}
	promised, why := 0, ""
	for _, g := range d.rules(text, true).Grants {
		if g.Why == "" {
			promised++
		}
		why += g.Why + "\n"
	}
	if promised != 4 {
		t.Errorf("%d are promised a grant, want 4:\n%s", promised, why)
	}
	for _, part := range []string{"gets the same name web-1", "used up (2 of 2)", "was revoked"} {
		if !strings.Contains(why, part) {
			t.Errorf("nothing says %q:\n%s", part, why)
		}
	}
	d.rules(text, false)
	enrolled := 0
	for _, a := range waiting {
		d.from(a, "edge", "10.7.0.1:4000")
		if a.Ready() == nil {
			enrolled++
		}
	}
	if enrolled != promised {
		t.Errorf("%d got in, %d were promised it", enrolled, promised)
	}
}

// A request that came by a file has no party that could be looked at: a rule
// that is made for it later grants it all the same.
func TestRuleGrantsWhatCameByAFile(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	id := d.offlineParty(wire.RoleNode)
	q := d.imports(d.offlineFile(id, enroll.Offer{Name: "vault-1", Tags: map[string]string{"site": "vault"}}))
	text := fmt.Sprintf("kind: rule\nname: vaults\nkeys: ['%s']\n", id.Fingerprint())
	if dry := d.rules(text, true); len(dry.Grants) != 1 || dry.Grants[0].Why != "" || dry.Grants[0].Request.State != api.RequestPending || len(d.requests(api.RequestPending)) != 1 {
		t.Errorf("dry run %+v", dry)
	}
	if out := d.rules(text, false); len(out.Grants) != 1 || out.Grants[0].Request.State != api.RequestGranted {
		t.Errorf("applied %+v", out)
	}
	got, err := d.store.LastRequest(t.Context(), id.KeyHash())
	if err != nil || got.ID != q.ID || got.State != api.RequestGranted || got.Rule != "vaults" || got.Source != sourceFile || got.Tags["site"] != "vault" {
		t.Fatalf("request %+v %v", got, err)
	}
	d.exports("vault-1")
}

// A key that was registered before is let in without a token; another one with
// the same name, tags, UUID and address is not.
func TestRuleGrantsARegisteredKey(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	manual := d.join(api.CreateJoin{Manual: true})
	a := d.party(wire.RoleNode, manual, "web-1")
	out := d.rules(fmt.Sprintf("kind: rule\nname: delivered\nkeys: ['%s']\nids: [%s]\n", a.id.Fingerprint(), a.id.ID()), false)
	if len(out.Objects) != 1 || out.Objects[0].Change != "created" || len(out.Grants) != 0 {
		t.Errorf("%+v", out)
	}
	thief := d.party(wire.RoleNode, manual, "web-1")
	claiming(t, thief, func(r *wire.EnrollRequest) { r.ID = a.id.ID() })
	d.see(thief)
	d.expect(thief, enroll.StateWaiting, wire.EnrollManual)
	// Why one whose key is registered waits on is told, as of a code.
	c := d.party(wire.RoleNode, manual, "web-2")
	d.see(c)
	dry := d.rules(fmt.Sprintf("kind: rule\nname: narrow\nkeys: ['%s']\nnames: ['db-*']\n", c.id.Fingerprint()), true)
	if len(dry.Grants) != 1 || dry.Grants[0].Rule != "" || !strings.Contains(dry.Grants[0].Why, `narrow: the name "web-2" is not among its names`) {
		t.Errorf("%+v", dry.Grants)
	}
	d.see(a)
	d.expect(a, enroll.StateEnrolled, "")
	// It opens no other name or UUID: those are an operator's to take away.
	live := d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	b := d.party(wire.RoleNode, manual, "db")
	d.rules(fmt.Sprintf("kind: rule\nname: second\nkeys: ['%s']\n", b.id.Fingerprint()), false)
	d.see(b)
	d.expect(b, enroll.StateWaiting, wire.EnrollNameInUse)
	if d.id.Revoked(live.id.KeyHash()) {
		t.Error("a rule replaced a live node")
	}
}

func TestRulesThatProveNothingAreRefused(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	manual := mustParse(t, d.join(api.CreateJoin{Manual: true})).TokenID
	rcp, err := d.addRCP(t.Context(), api.AddRCP{Name: "edge"})
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"kind: rule\nname: a\ncidrs: [10.0.0.0/8]\n":                                "proves nothing",
		"kind: rule\nname: a\nids: [" + string(wire.NewID()) + "]\nnames: [x]\n":    "proves nothing",
		"kind: rule\nname: a\njoins: [" + manual + "]\n":                            "holds no token",
		"kind: rule\nname: a\njoins: [" + rcp.Join.ID + "]\n":                       "not for nodes",
		"kind: rule\nname: a\njoins: [" + string(wire.NewID()) + "]\n":              "no join code",
		"kind: rule\nname: a\njoins: []\n":                                          "want 1 to",
		"kind: rule\nname: a\nkeys: [SHA256:abc]\n":                                 "is not a fingerprint",
		"kind: rule\nname: a\nkeys: ['SHA256:" + strings.Repeat("A", 42) + "B=']\n": "is not a fingerprint", // base64 that nothing prints
		"kind: rule\nname: a\nkeys: [x]\nset: {a: b, a: c}\n":                       "r.yaml:4: tag \"a\" stands twice in set",
		"kind: rule\nname: a\nkeys: [x]\ncidrs: [10.0.0.0]\n":                       "is not a network",
		"kind: rule\nname: a\nkeys: [x]\nnames: ['[']\n":                            "no glob",
		"kind: rule\nname: a\nkeys: [x]\nnetworks: [10.0.0.0/8]\n":                  "unknown key",
		"kind: policy\nname: p\ntype: check\nspec: {command: [/bin/true]}\n":        "no rule to apply",
		"kind: rule\nname: a\nkeys: ['" + d.id.Fingerprint() + "']\nset: {'': b}\n": "set:",
	} {
		_, err := d.applyRules(t.Context(), api.ApplyRules{Manifests: []api.Manifest{{File: "r.yaml", Text: text}}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	if rules, err := d.store.Rules(t.Context(), store.DefaultTenant); err != nil || len(rules) != 0 {
		t.Errorf("rules %+v %v", rules, err)
	}
}

// TestNetworksOfRules: a network of IPv4-mapped addresses is the IPv4 network,
// as the sources are that it is compared with.
func TestNetworksOfRules(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		cidr, source string
		in           bool
	}{
		{"10.7.0.0/16", "[::ffff:10.7.1.2]:99", true},
		{"::ffff:10.7.0.0/112", "10.7.1.2:99", true},
		{"::ffff:10.7.0.0/112", "[::ffff:10.7.1.2]:99", true},
		{"::ffff:10.7.0.0/112", "10.8.1.2:99", false},
		{"2001:db8::/32", "[2001:db8::1%eth0]:99", true},
	} {
		r, err := newRule("plant", `{"keys":["x"],"cidrs":["`+c.cidr+`"]}`)
		if err != nil {
			t.Fatal(err)
		}
		if within(r.prefixes, c.source) != c.in {
			t.Errorf("%s within %s: want %t", c.source, c.cidr, c.in)
		}
	}
}
