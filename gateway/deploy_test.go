package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/wire"
)

// obeying makes a fake node take desired states as a node does: it verifies
// them, refuses lower revisions, and applies every policy but those in broken.
type obeying struct {
	*fakeNode
	docs   []wire.Desired
	refuse string
	broken map[string]bool
}

func (w *world) obeying(name string) *obeying {
	o := &obeying{fakeNode: w.node(name), broken: map[string]bool{}}
	o.mux.HandleFunc("PUT "+wire.PathDesired, o.desired)
	return o
}

func (o *obeying) desired(rw http.ResponseWriter, r *http.Request) {
	var env wire.Envelope
	var doc wire.Desired
	if err := wire.DecodeJSON(r.Body, wire.MaxDesired, &env); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, err := o.id.VerifyEnvelope(env, wire.TypeDesired, wire.RoleGateway, &doc); err != nil {
		http.Error(rw, err.Error(), http.StatusForbidden)
		return
	}
	o.docs = append(o.docs, doc)
	res := wire.DesiredResult{Applied: o.hello.Applied, State: o.hello.State, Refused: o.refuse}
	switch {
	case o.hello.Installation != doc.Installation:
		o.hello.State, res.State, res.Refused = wire.StateLocked, wire.StateLocked, refusedLocked
	case doc.Revision.Compare(o.hello.Applied) < 0:
		res.Refused = "older"
	}
	if res.Refused == "" {
		o.hello.Applied, res.Applied, o.hello.Policies = doc.Revision, doc.Revision, nil
		for _, p := range doc.Policies {
			st := wire.PolicyStatus{Name: p.Name, Type: p.Type, Digest: p.Digest, State: wire.PolicyApplied, Since: time.Now().UTC()}
			if spec := doc.Specs[p.Digest]; wire.SpecDigest(spec) != p.Digest {
				st.State, st.Error = wire.PolicyFailed, "wrong digest"
			}
			if o.broken[p.Name] {
				st.State, st.Error = wire.PolicyFailed, "validate said no"
			}
			o.hello.Policies = append(o.hello.Policies, st)
		}
		res.Policies = o.hello.Policies
	}
	_ = json.NewEncoder(rw).Encode(res)
}

func (o *obeying) last() (doc wire.Desired, count int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.docs) == 0 {
		return doc, 0
	}
	return o.docs[len(o.docs)-1], len(o.docs)
}

func policyNames(d wire.Desired) (names []string) {
	for _, p := range d.Policies {
		names = append(names, p.Name)
	}
	return names
}

// inStep waits until the node has what it should.
func (w *world) inStep(c *api.Client, name string) api.NodeDetail {
	w.t.Helper()
	var n api.NodeDetail
	eventually(w.t, name+" has its desired revision", func() bool {
		var err error
		n, err = c.Node(w.t.Context(), name)
		return err == nil && !n.DesiredRevision.IsZero() && n.DesiredRevision == n.AppliedRevision
	})
	return n
}

func TestDesiredStateReachesNodes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	w.enrolled(n.fakeNode)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		p, err := tx.RCP(ctx, "dmz")
		if err != nil {
			return err
		}
		p.Public = []string{"rcp.example:9090"}
		return tx.SaveRCP(ctx, p)
	})
	n.hello.Tags = map[string]string{"role": "web", "zone": "a"}
	r.hold(n.fakeNode)
	w.run()
	c := w.client()
	w.inStep(c, "web")
	doc, _ := n.last()
	if doc.Installation != w.db.Installation().UID || doc.Node != n.id.ID() || doc.Name != "web" || doc.Tags["role"] != "web" ||
		len(doc.RCPs) != 1 || doc.RCPs[0].Addresses[0] != "rcp.example:9090" || doc.RCPs[0].ID != r.id.ID() || len(doc.Policies) != 0 {
		t.Fatalf("first state: %+v", doc)
	}

	applyText(t, c, twoPolicies, false)
	eventually(t, "the policies arrive", func() bool { d, _ := n.last(); return slices.Equal(policyNames(d), []string{"motd", "up"}) })
	w.inStep(c, "web")
	st, err := c.DeploymentStatus(t.Context(), "base")
	if err != nil || st.State != api.DeploymentActive || st.Counts != (api.DeploymentCounts{Applied: 1}) {
		t.Errorf("%+v, %v", st, err)
	}

	// An operator's tag beats the node's own.
	if _, err := c.TagNode(t.Context(), "web", api.TagChange{Set: map[string]string{"role": "db"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the policies go", func() bool { d, _ := n.last(); return len(d.Policies) == 0 && d.Tags["role"] == "db" })
	detail := w.inStep(c, "web")
	if !slices.ContainsFunc(detail.TagSources, func(s api.TagSource) bool { return s.Source == "node" && s.Key == "role" && !s.Effective }) {
		t.Errorf("%+v", detail.TagSources)
	}

	// The addresses of an RCP change: nodes are told.
	public := []string{"new.example:9090"}
	if _, err := c.SetRCP(t.Context(), "dmz", api.SetRCP{Public: &public}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new address arrives", func() bool { d, _ := n.last(); return d.RCPs[0].Addresses[0] == "new.example:9090" })
}

// client returns a client of the API that runs.
func (w *world) client() *api.Client {
	w.t.Helper()
	c, err := api.NewClient(api.ClientConfig{URL: w.cfg.Socket})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	eventually(w.t, "the API answers", func() bool { _, err := c.About(w.t.Context()); return err == nil })
	return c
}

func TestFailedAndOfflineNodes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, good, bad, away := w.rcp("dmz"), w.obeying("good"), w.obeying("bad"), w.obeying("away")
	for _, n := range []*obeying{good, bad, away} {
		n.hello.Tags = map[string]string{"role": "web"}
		w.enrolled(n.fakeNode)
		w.update(func(ctx context.Context, tx *store.Tx) error {
			return tx.SetJoinTags(ctx, n.id.ID(), n.hello.Tags)
		})
	}
	bad.broken["motd"] = true
	r.hold(good.fakeNode, bad.fakeNode)
	w.run()
	c := w.client()
	w.inStep(c, "good")
	w.inStep(c, "bad")
	if out := applyText(t, c, twoPolicies, false); out.Offline != 1 || len(out.Nodes) != 3 {
		t.Errorf("%+v", out)
	}
	status := func(want api.DeploymentCounts) api.DeploymentStatus {
		t.Helper()
		var st api.DeploymentStatus
		eventually(t, fmt.Sprintf("%+v", want), func() bool {
			st, _ = c.DeploymentStatus(t.Context(), "base")
			return st.Counts == want
		})
		return st
	}
	st := status(api.DeploymentCounts{Applied: 1, Failed: 1, Offline: 1})
	i := slices.IndexFunc(st.Nodes, func(n api.DeploymentNode) bool { return n.Node == "bad" && n.Policy == "motd" })
	if st.State != api.DeploymentDegraded || i < 0 || st.Nodes[i].State != "failed" || st.Nodes[i].Error != "validate said no" || st.Nodes[i].Revision.IsZero() {
		t.Errorf("%+v", st)
	}
	// The absent one gets it when it comes; only the newest, once.
	applyText(t, c, strings.ReplaceAll(twoPolicies, "hello", "newer"), false)
	r.hold(away.fakeNode)
	status(api.DeploymentCounts{Applied: 2, Failed: 1})
	if doc, count := away.last(); count != 1 || !strings.Contains(string(doc.Specs[doc.Policies[0].Digest]), "newer") {
		t.Errorf("%d documents, the last %+v", count, doc)
	}

	// A deleted deployment is an orphan until the last node is free of it.
	r.drop(away.fakeNode)
	eventually(t, "away is gone", func() bool { return !w.s.fleet.Presence(away.id.ID()).Connected })
	if _, err := c.DeleteDeployment(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "only the absent node carries it", func() bool {
		st, err := c.DeploymentStatus(t.Context(), "base")
		return err == nil && st.State == api.DeploymentOrphan && st.Counts == (api.DeploymentCounts{Offline: 1})
	})
	r.hold(away.fakeNode)
	eventually(t, "it ends", func() bool {
		_, err := c.DeploymentStatus(t.Context(), "base")
		return codeOfError(err) == api.CodeNotFound
	})
}

func TestRefusingNode(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	n.refuse = "wrong-node"
	w.enrolled(n.fakeNode)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.SetJoinTags(ctx, n.id.ID(), map[string]string{"role": "web"})
	})
	r.hold(n.fakeNode)
	w.run()
	c := w.client()
	applyText(t, c, twoPolicies, false)
	eventually(t, "the refusal is shown", func() bool {
		st, err := c.DeploymentStatus(t.Context(), "base")
		return err == nil && st.State == api.DeploymentError && strings.Contains(st.Nodes[0].Error, "wrong-node")
	})
	eventually(t, "the node's reason says so", func() bool {
		d, err := c.Node(t.Context(), "web")
		return err == nil && strings.Contains(d.StateReason, "wrong-node")
	})
}

// A restored backup is older than what nodes have seen: nothing is pushed, and
// an operator is told, until a new generation begins.
func TestRestoredDatabaseDoesNotPush(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	w.enrolled(n.fakeNode)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.SetJoinTags(ctx, n.id.ID(), map[string]string{"role": "web"})
	})
	r.hold(n.fakeNode)
	w.run()
	c := w.client()
	w.inStep(c, "web")
	w.stop() // closing brings all of it into the one file
	file := filepath.Join(w.dir, "sallyport.db")
	backup, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w.open()
	w.run()
	applyText(t, w.client(), twoPolicies, false)
	w.inStep(c, "web")
	before, pushes := n.last()
	w.stop()

	if err := os.WriteFile(file, backup, 0o600); err != nil {
		t.Fatal(err)
	}
	w.open()
	w.run()
	c = w.client()
	eventually(t, "the reason says so", func() bool {
		d, err := c.Node(t.Context(), "web")
		return err == nil && strings.Contains(d.StateReason, "older than the node's state") && strings.Contains(d.StateReason, before.Revision.String())
	})
	applyText(t, c, strings.ReplaceAll(twoPolicies, "hello", "other"), false)
	eventually(t, "an event says so", func() bool {
		es, err := c.Events(t.Context(), api.EventQuery{Node: "web", Key: keyAhead})
		return err == nil && len(es) == 1 && es[0].Severity == wire.SeverityMajor
	})
	if _, count := n.last(); count != pushes {
		t.Fatalf("%d documents were pushed", count-pushes)
	}
	w.stop()

	w.open()
	if err := w.db.RaiseGeneration(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	w.run()
	eventually(t, "the new generation is pushed", func() bool {
		d, count := n.last()
		return count > pushes && d.Revision.Generation == 2
	})
	d := w.inStep(w.client(), "web")
	eventually(t, "the reason goes", func() bool { return w.s.fleet.Presence(d.ID).Reason == "" })
}

// A node with a valid certificate that the database does not know, as after
// the database was wiped, is shown and left alone.
func TestUnknownNodeIsLeftAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	n.hello.Installation = "the one before"
	n.hello.Tags = map[string]string{"role": "web"}
	r.hold(n.fakeNode)
	w.run()
	c := w.client()
	applyText(t, c, twoPolicies, false)
	var list []api.Node
	eventually(t, "it is listed as locked", func() bool {
		var err error
		list, err = c.Nodes(t.Context(), api.NodeQuery{})
		return err == nil && len(list) == 1 && list[0].State == wire.StateLocked
	})
	if list[0].ID != n.id.ID() || !strings.Contains(list[0].StateReason, "unknown") {
		t.Errorf("%+v", list[0])
	}
	if _, count := n.last(); count != 0 {
		t.Errorf("%d documents were pushed", count)
	}
	if rows, err := w.db.Nodes(t.Context()); err != nil || len(rows) != 0 {
		t.Errorf("it was adopted: %v, %v", rows, err)
	}
}

// TestNodeOfAnotherInstallationIsTold: by a push, which it refuses. It is locked
// from then on, which `local unlock` asks for, and is left alone.
func TestNodeOfAnotherInstallationIsTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	n.hello.Installation, n.hello.Applied = "another", wire.Revision{Generation: 9, N: 9}
	w.enrolled(n.fakeNode)
	r.hold(n.fakeNode)
	w.run()
	w.state(n.id.ID(), wire.StateLocked)
	eventually(t, "the refusal is recorded", func() bool {
		d, err := w.db.Desired(t.Context(), n.id.ID())
		return err == nil && d.Refused == refusedLocked
	})
	if d, count := n.last(); count != 1 || d.Installation != w.db.Installation().UID {
		t.Errorf("%d documents were pushed, the last of installation %q", count, d.Installation)
	}
	n.mu.Lock()
	locked := n.hello
	n.mu.Unlock()
	if locked.State != wire.StateLocked {
		t.Errorf("the node is %s", locked.State)
	}
	for _, state := range []wire.NodeState{wire.StateLocked, wire.StateRunning} { // and freed by the gateway that it obeys
		locked.State = state
		if err := w.s.reconcile(t.Context(), n.id.ID(), &locked); err != nil {
			t.Error(err)
		}
		if _, count := n.last(); count != 1 {
			t.Errorf("%d documents were pushed to a node that is %s and was told", count, state)
		}
	}
}

// TestLockedByAnotherGateway: a node that obeys this installation, and was asked by a
// gateway of another one meanwhile, is locked until it is pushed what it has.
func TestLockedByAnotherGateway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploys = true
	w.serveAPI(false)
	r, n := w.rcp("dmz"), w.obeying("web")
	w.enrolled(n.fakeNode)
	r.hold(n.fakeNode)
	w.run()
	w.state(n.id.ID(), wire.StateRunning)
	eventually(t, "it has what it should", func() bool { _, count := n.last(); return count > 0 })
	n.mu.Lock()
	hello := n.hello
	n.mu.Unlock()
	_, before := n.last()
	for state, pushes := range map[wire.NodeState]int{wire.StateRunning: 0, wire.StateLocked: 1} {
		hello.Installation, hello.State = w.db.Installation().UID, state
		if err := w.s.reconcile(t.Context(), n.id.ID(), &hello); err != nil {
			t.Error(err)
		}
		_, count := n.last()
		if count != before+pushes {
			t.Errorf("%s: %d pushes, want %d", state, count-before, pushes)
		}
		before = count
	}
}

func TestMaximumKeepsThoseThatHaveIt(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	for _, name := range []string{"m", "n"} {
		w.addNode(name, map[string]string{"role": "web"})
	}
	applyText(t, c, twoPolicies+"max: 1\n", false)
	nodes := func() (names []string) {
		st, err := c.DeploymentStatus(t.Context(), "base")
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range st.Nodes {
			names = append(names, n.Node)
		}
		return slices.Compact(names)
	}
	if got := nodes(); !slices.Equal(got, []string{"m"}) {
		t.Errorf("%v", got)
	}
	w.addNode("a", map[string]string{"role": "web"}) // comes first by name
	applyText(t, c, strings.ReplaceAll(twoPolicies, "hello", "newer")+"max: 1\n", false)
	if got := nodes(); !slices.Equal(got, []string{"m"}) {
		t.Errorf("it moved to %v", got)
	}
	if _, err := c.TagNode(t.Context(), "m", api.TagChange{Remove: []string{"role"}}); err != nil {
		t.Fatal(err)
	}
	if got := nodes(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("m left, and the deployment is on %v", got)
	}
	applyText(t, c, twoPolicies+"min: 3\n", false)
	if st, err := c.DeploymentStatus(t.Context(), "base"); err != nil || st.State != api.DeploymentDegraded || !strings.Contains(st.Reason, "at least 3") {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestFileEffects(t *testing.T) {
	t.Parallel()
	w, c := serving(t, false)
	w.addNode("web-1", map[string]string{"role": "web"})
	applyText(t, c, twoPolicies, false)
	rival := "kind: policy\nname: rival\ntype: files\nspec: {files: [{path: /etc/motd, content: x}, {path: /etc/issue, content: x}]}\n---\n" +
		"kind: deployment\nname: second\nselector: role\npolicies: [rival]\n"
	dry := applyText(t, c, rival, true)
	if len(dry.Conflicts) != 1 || !strings.Contains(dry.Conflicts[0], "/etc/motd is claimed by the policies motd and rival") {
		t.Errorf("%+v", dry.Conflicts)
	}
	applyText(t, c, rival, false)
	gone, err := c.DeleteDeployment(t.Context(), "second")
	if err != nil || gone.Files != 1 || len(gone.Nodes) != 1 || !slices.Equal(gone.Nodes[0].Remove, []string{"rival"}) {
		t.Errorf("%+v, %v", gone, err)
	}
	roll := applyText(t, c, twoPolicies+"rollout: {max_parallel: 10%, max_failures: 0}\n", false)
	if len(roll.Warnings) != 1 || !strings.Contains(roll.Warnings[0], "rollout") {
		t.Errorf("%+v", roll.Warnings)
	}
}

// BenchmarkPlan measures what each change costs with many nodes: reading all,
// selecting, comparing; and what one node costs that has enrolled.
func BenchmarkPlan(b *testing.B) {
	const nodes = 2000
	spec := `{"content":"` + strings.Repeat("x", 64<<10) + `"}`
	db, err := store.Open(b.Context(), store.Config{Path: filepath.Join(b.TempDir(), "x.db"), Log: testLog(b)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	run := func(f func(ctx context.Context, tx *store.Tx) error) {
		if err := db.Update(b.Context(), f); err != nil {
			b.Fatal(err)
		}
	}
	run(func(ctx context.Context, tx *store.Tx) error {
		for i := range nodes {
			id := wire.NewID()
			if err := tx.AddNode(ctx, &store.Node{ID: id, Name: fmt.Sprint("n-", i), State: wire.StateRunning}); err != nil {
				return err
			}
			if err := tx.SetJoinTags(ctx, id, map[string]string{"role": "web", "zone": fmt.Sprint(i % 10)}); err != nil {
				return err
			}
		}
		for i := range 20 {
			name := fmt.Sprint("p-", i)
			if _, err := tx.PutPolicy(ctx, &store.Policy{Tenant: store.DefaultTenant, Name: name, Type: "check", Spec: spec}); err != nil {
				return err
			}
			d := &store.Deployment{Tenant: store.DefaultTenant, Name: name, Selector: fmt.Sprintf("zone in (%d)", i%10), Policies: []string{name}}
			if _, err := tx.PutDeployment(ctx, d, false); err != nil {
				return err
			}
		}
		return nil
	})
	all, err := db.Nodes(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	plan := func(ids ...wire.ID) {
		run(func(ctx context.Context, tx *store.Tx) error {
			p, err := newPlanner(ctx, tx, 1, nil, ids...)
			if err == nil {
				_, err = p.plan(ctx)
			}
			return err
		})
	}
	plan()
	b.Run(fmt.Sprintf("all of %d", nodes), func(b *testing.B) {
		for b.Loop() {
			plan()
		}
	})
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			plan(all[0].ID)
		}
	})
}

// TestSpecsInMemory: what was sent a moment ago is not read again, what is
// nowhere is left out, and memory is bounded.
func TestSpecsInMemory(t *testing.T) {
	w := newWorld(t)
	var c specs
	large := json.RawMessage(`{"files":[{"path":"/etc/large","content":"` + strings.Repeat("x", maxSpecs/4) + `"}]}`)
	digests := map[string]json.RawMessage{}
	err := w.db.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		for i := range 5 {
			spec := slices.Concat(large[:len(large)-3], []byte{byte('a' + i)}, large[len(large)-3:])
			if _, err := tx.PutPolicy(ctx, &store.Policy{Tenant: store.DefaultTenant, Name: fmt.Sprintf("p%d", i), Type: wire.PolicyFiles, Spec: string(spec)}); err != nil {
				return err
			}
			digests[wire.SpecDigest(spec)] = spec
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for digest, want := range digests {
			got, err := c.get(t.Context(), w.db, []string{digest, "nowhere"})
			if err != nil || len(got) != 1 || !bytes.Equal(got[digest], want) {
				t.Fatalf("%.12s: %d specs, %d bytes, want 1 of %d: %v", digest, len(got), len(got[digest]), len(want), err)
			}
			if c.size > maxSpecs {
				t.Fatalf("%d bytes are kept, the limit is %d", c.size, maxSpecs)
			}
			over, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := c.get(over, w.db, []string{digest}); err != nil {
				t.Errorf("%.12s was not in memory: %v", digest, err)
			}
		}
	}
}
