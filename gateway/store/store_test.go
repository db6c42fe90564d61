package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sallyport/gateway/bus"
	"sallyport/internal/sqldb"
	"sallyport/internal/wire"
)

var ctx = context.Background()

func open(t testing.TB, path string) *DB {
	t.Helper()
	db, err := Open(ctx, Config{Path: path, Log: slog.New(slog.DiscardHandler), Bus: new(bus.Local)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func temp(t testing.TB) *DB { return open(t, filepath.Join(t.TempDir(), "sallyport.db")) }

func update(t testing.TB, db *DB, f func(tx *Tx) error) {
	t.Helper()
	if err := db.Update(ctx, func(_ context.Context, tx *Tx) error { return f(tx) }); err != nil {
		t.Fatal(err)
	}
}

func addNode(t testing.TB, db *DB, name string) wire.ID {
	t.Helper()
	id := wire.NewID()
	update(t, db, func(tx *Tx) error { return tx.AddNode(ctx, &Node{ID: id, Name: name, State: wire.StatePending}) })
	return id
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestInstallationIsMadeOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sallyport.db")
	db := open(t, path)
	first := db.Installation()
	if _, err := wire.ParseID(first.UID); err != nil || first.Generation != 1 {
		t.Fatalf("%+v, %v", first, err)
	}
	if _, err := Open(ctx, Config{Path: path, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, sqldb.ErrLocked) {
		t.Fatalf("a second gateway on the same database: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if again := open(t, path).Installation(); again.UID != first.UID || again.Generation != 1 {
		t.Fatalf("%+v became %+v", first, again)
	}
	if other := temp(t).Installation(); other.UID == first.UID {
		t.Fatal("two installations have one UID")
	}
}

func TestNodeRoundTrip(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "web-1")
	hello := &wire.Hello{
		Party: wire.Party{ID: id, Role: wire.RoleNode}, Boot: "b", Program: "1.0", Versions: wire.OwnVersions, Mode: "managed", OS: "linux", Arch: "amd64",
		Installation: "i", Applied: wire.Revision{Generation: 1, N: 7}, Tags: map[string]string{"role": "web"},
		Policies: []wire.PolicyStatus{{Name: "p", Type: "check", Digest: "d", State: wire.PolicyFailed, Error: "no", Since: time.Now()}},
		Outbox:   wire.OutboxState{Spool: "s", Next: 3}, NotAfter: time.Now().Add(time.Hour),
	}
	for range 2 {
		update(t, db, func(tx *Tx) error {
			n, err := tx.RecordHello(ctx, hello, 2*time.Second)
			if err == nil && n.Boot != hello.Boot {
				err = fmt.Errorf("it returns %+v", n)
			}
			return err
		})
		if tags := Effective(must[[]NodeTag](t)(db.NodeTags(ctx, id))); !maps.Equal(tags, hello.Tags) {
			t.Errorf("tags %v", tags)
		}
	}
	n := must[*Node](t)(db.Node(ctx, id))
	if n.Name != "web-1" || n.Applied() != hello.Applied || n.Outbox.Next != 3 || !n.NotAfter.Equal(hello.NotAfter.Truncate(time.Microsecond)) || !n.RemovedAt.IsZero() || n.LastSeen.IsZero() {
		t.Errorf("%+v", n)
	}
	if st := must[[]PolicyStatus](t)(db.PolicyStatus(ctx, id)); len(st) != 1 || st[0].Error != "no" {
		t.Errorf("%+v", st)
	}
	if byName := must[*Node](t)(db.NodeByName(ctx, DefaultTenant, "web-1")); byName.ID != id {
		t.Errorf("%+v", byName)
	}
}

func TestNodeNamesAndRemoval(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "web-1")
	dup := func(tx *Tx) error {
		return tx.AddNode(ctx, &Node{ID: wire.NewID(), Name: "web-1", State: wire.StatePending})
	}
	if err := db.Update(ctx, func(_ context.Context, tx *Tx) error { return dup(tx) }); !errors.Is(err, ErrExists) {
		t.Fatalf("two live nodes of one name: %v", err)
	}
	update(t, db, func(tx *Tx) error { return tx.TagNode(ctx, id, map[string]string{"env": "prod"}, nil) })
	update(t, db, func(tx *Tx) error { return tx.RemoveNode(ctx, id) })
	if _, err := db.Node(ctx, id); !errors.Is(err, ErrNotFound) {
		t.Fatalf("removed: %v", err)
	}
	update(t, db, dup) // the name is free
	was := must[*Node](t)(db.AnyNode(ctx, id))
	applied := wire.Revision{Generation: 1, N: 7}
	update(t, db, func(tx *Tx) error { return tx.SetApplied(ctx, id, applied) })
	update(t, db, func(tx *Tx) error {
		return tx.AddNode(ctx, &Node{ID: id, Name: "web-2", State: wire.StateRunning})
	})
	n := must[*Node](t)(db.Node(ctx, id))
	if n.Version != was.Version+1 || !n.CreatedAt.Equal(was.CreatedAt) || n.Applied() != applied {
		t.Errorf("version %d made %s with %v applied, was version %d made %s", n.Version, n.CreatedAt, n.Applied(), was.Version, was.CreatedAt)
	}
	if tags := Effective(must[[]NodeTag](t)(db.NodeTags(ctx, id))); n.Name != "web-2" || tags["env"] != "prod" {
		t.Errorf("enrolled again: %+v, tags %v", n, tags)
	}
}

func TestFindNodes(t *testing.T) {
	db := temp(t)
	a, b := addNode(t, db, "web"), addNode(t, db, "web-2")
	addNode(t, db, "db_1%")
	for ref, want := range map[string]int{"web": 1, "we": 2, "web-": 1, string(a): 1, string(b)[:13]: 1, "db_1%": 1, "db_1": 1, "d_": 0, "%": 0, "": 0, "nope": 0} {
		if got := must[[]*Node](t)(db.FindNodes(ctx, ref, 10)); len(got) != want {
			t.Errorf("%q: %d nodes; want %d", ref, len(got), want)
		}
	}
}

func TestTagPrecedence(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	own := func(tags map[string]string) {
		update(t, db, func(tx *Tx) error {
			_, err := tx.RecordHello(ctx, &wire.Hello{Party: wire.Party{ID: id}, Tags: tags}, 0)
			return err
		})
	}
	check := func(step string, want map[string]string) {
		t.Helper()
		if got := Effective(must[[]NodeTag](t)(db.NodeTags(ctx, id))); !maps.Equal(got, want) {
			t.Errorf("%s: %v; want %v", step, got, want)
		}
	}
	own(map[string]string{"role": "own", "env": "own", "x": "own"})
	update(t, db, func(tx *Tx) error { return tx.SetJoinTags(ctx, id, map[string]string{"role": "join", "env": "join"}) })
	update(t, db, func(tx *Tx) error { return tx.TagNode(ctx, id, map[string]string{"role": "gateway"}, nil) })
	check("each source", map[string]string{"role": "gateway", "env": "join", "x": "own"})
	own(map[string]string{})
	check("the node drops its tags", map[string]string{"role": "gateway", "env": "join"})
	own(map[string]string{"x": "own", "role": "again"})
	update(t, db, func(tx *Tx) error { return tx.TagNode(ctx, id, nil, []string{"role", "env", "x"}) })
	check("the operator removes them", map[string]string{})
	own(map[string]string{"x": "back", "env": "back"})
	check("the node cannot bring them back", map[string]string{})
	update(t, db, func(tx *Tx) error { return tx.TagNode(ctx, id, map[string]string{"x": "set"}, nil) })
	check("the operator can", map[string]string{"x": "set"})
}

// A node that sets more tags than anybody needs leaves room for the operator's.
func TestNodeSetsABoundedNumberOfTags(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	tags := map[string]string{}
	for i := range 5000 {
		tags[fmt.Sprintf("k%04d", i)] = "own"
	}
	for range 2 {
		update(t, db, func(tx *Tx) error {
			_, err := tx.RecordHello(ctx, &wire.Hello{Party: wire.Party{ID: id}, Tags: tags}, 0)
			return err
		})
		got := Effective(must[[]NodeTag](t)(db.NodeTags(ctx, id)))
		if len(got) != maxOwnTags || got["k0000"] != "own" || got["k0127"] != "own" {
			t.Errorf("%d tags are kept, want the first %d", len(got), maxOwnTags)
		}
	}
}

func TestAllowedTags(t *testing.T) {
	for _, c := range []struct {
		globs []string
		want  bool
	}{{nil, true}, {[]string{"role=*"}, true}, {[]string{"role"}, true}, {[]string{"env=*", "role=w?b"}, true}, {[]string{"env"}, false}, {[]string{"role=db"}, false}, {[]string{"["}, false}} {
		if got := AllowsTag(c.globs, "role", "web"); got != c.want {
			t.Errorf("%q: %v", c.globs, got)
		}
	}
}

func TestStateSinceMovesOnlyWithTheState(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	db, err := Open(ctx, Config{Path: filepath.Join(t.TempDir(), "x.db"), Log: slog.New(slog.DiscardHandler), Bus: new(bus.Local), Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	id := addNode(t, db, "n")
	wakes, cancel := db.bus.Subscribe(bus.Nodes)
	defer cancel()
	now = now.Add(time.Hour)
	running := now
	for i, reason := range []string{"", "", "other reason"} {
		update(t, db, func(tx *Tx) error { return tx.SetNodeState(ctx, id, wire.StateRunning, reason) })
		if n := must[*Node](t)(db.Node(ctx, id)); !n.StateSince.Equal(running) || n.StateReason != reason {
			t.Errorf("since %v, reason %q", n.StateSince, n.StateReason)
		}
		if told := len(wakes) > 0; told == (i == 1) {
			t.Errorf("change %d: watchers are told: %v", i, told)
		}
		for len(wakes) > 0 {
			<-wakes
		}
		now = now.Add(time.Hour)
	}
	err = db.Update(ctx, func(_ context.Context, tx *Tx) error {
		return tx.SetNodeState(ctx, wire.NewID(), wire.StateDown, "")
	})
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown node: %v", err)
	}
}

func TestPolicyVersionsAreImmutable(t *testing.T) {
	db := temp(t)
	put := func(spec string) (p *Policy, change string) {
		p = &Policy{Tenant: DefaultTenant, Name: "p", Type: "check", Spec: spec}
		update(t, db, func(tx *Tx) (err error) { change, err = tx.PutPolicy(ctx, p); return err })
		return p, change
	}
	for i, c := range []struct {
		spec, change string
		version      int64
	}{{`{"a":1}`, Created, 1}, {`{"a":1}`, Unchanged, 1}, {`{"a":2}`, Changed, 2}, {`{"a":1}`, Changed, 3}} {
		if p, change := put(c.spec); change != c.change || p.Version != c.version {
			t.Errorf("step %d: %s, version %d; want %s, %d", i, change, p.Version, c.change, c.version)
		}
	}
	if vs := must[[]*Policy](t)(db.PolicyVersions(ctx, DefaultTenant, "p")); len(vs) != 3 || vs[0].Version != 3 || vs[2].Spec != `{"a":1}` {
		t.Errorf("%+v", vs)
	}
	update(t, db, func(tx *Tx) error { return tx.DeletePolicy(ctx, DefaultTenant, "p") })
	if _, err := db.Policy(ctx, DefaultTenant, "p"); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: %v", err)
	}
	if p, change := put(`{"a":9}`); change != Created || p.Version != 4 {
		t.Errorf("after deletion: %s, version %d", change, p.Version)
	}
	specs := must[map[string]string](t)(func() (map[string]string, error) {
		raw, err := db.Specs(ctx, []string{wire.SpecDigest([]byte(`{"a":1}`)), "none"})
		out := map[string]string{}
		for _, v := range raw {
			out[string(v)] = string(v)
		}
		return out, err
	}())
	if len(specs) != 1 || specs[`{"a":1}`] == "" {
		t.Errorf("%v", specs)
	}
}

func TestDesiredRevisionsOnlyRise(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	var last wire.Revision
	for i := range 3 {
		d := &Desired{NodeID: id, Digest: fmt.Sprint(i), Content: DesiredContent{Name: "n", Policies: []DesiredPolicy{{Policy: wire.Policy{Name: "p"}, Deployments: []string{"d"}}}}}
		update(t, db, func(tx *Tx) error { return tx.PutDesired(ctx, d) })
		got := must[*Desired](t)(db.Desired(ctx, id))
		if got.Revision().Compare(last) <= 0 || got.Revision() != d.Revision() || got.Content.Policies[0].Deployments[0] != "d" {
			t.Fatalf("%+v after %v", got, last)
		}
		last = got.Revision()
	}
}

func TestAuditIsWrittenWithTheChange(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	as := WithActor(ctx, Actor{Who: "alice", Origin: "unix socket"})
	boom := errors.New("boom")
	err := db.Update(as, func(ctx context.Context, tx *Tx) error {
		tx.Audit(ctx, "node.tag", "n", "")
		return boom
	})
	if !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if err := db.Try(as, func(ctx context.Context, tx *Tx) error { tx.Audit(ctx, "node.try", "n", ""); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := db.Update(as, func(ctx context.Context, tx *Tx) error {
		tx.Audit(ctx, "node.tag", "n", "env=prod")
		return tx.TagNode(ctx, id, map[string]string{"env": "prod"}, nil)
	}); err != nil {
		t.Fatal(err)
	}
	log := must[[]AuditEntry](t)(db.AuditLog(ctx, AuditFilter{Limit: 10}))
	if len(log) != 1 || log[0].Who != "alice" || log[0].What != "node.tag" || log[0].Result != ResultOK || log[0].Pos == 0 || log[0].Detail != "env=prod" {
		t.Errorf("%+v", log)
	}
}

func TestActions(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "n")
	mk := func() *Action {
		return &Action{ID: wire.NewID(), Batch: "b", Tenant: DefaultTenant, NodeID: id, NodeName: "n", Command: []string{"sh", "-c", "x"}, TTL: time.Minute}
	}
	a, b := mk(), mk()
	update(t, db, func(tx *Tx) error { return tx.AddActions(ctx, []*Action{a, b}) })
	list := must[[]*Action](t)(db.Actions(ctx, ActionFilter{Batch: "b", OpenOnly: true}))
	if len(list) != 2 || list[1].ID != a.ID || !slices.Equal(list[1].Command, a.Command) || !list[1].ExpiresAt.Equal(list[1].CreatedAt.Add(time.Minute)) || list[1].TTL != time.Minute {
		t.Fatalf("%+v", list)
	}
	frames := []wire.ActionFrame{{N: 1, Stream: "stdout", Data: []byte("out\n")}, {N: 2, Stream: "stderr", Data: []byte("err\n")}, {N: 3, Result: &wire.ActionResult{}}}
	for range 2 { // a retry brings the same frames
		update(t, db, func(tx *Tx) error { return tx.AddFrames(ctx, a, frames) })
	}
	if got := must[[]wire.ActionFrame](t)(db.Frames(ctx, a.ID, 1, 10)); len(got) != 1 || string(got[0].Data) != "err\n" || got[0].Stream != "stderr" {
		t.Errorf("%+v", got)
	}
	code := 3
	a.State, a.ExitCode = wire.ActionFailed, &code
	update(t, db, func(tx *Tx) error { return tx.SaveAction(ctx, a) })
	a.State = wire.ActionSucceeded
	if err := db.Update(ctx, func(_ context.Context, tx *Tx) error { return tx.SaveAction(ctx, a) }); !errors.Is(err, ErrChanged) {
		t.Errorf("an action ended twice: %v", err)
	}
	if got := must[*Action](t)(db.Action(ctx, a.ID)); got.State != wire.ActionFailed || *got.ExitCode != 3 || got.EndedAt.IsZero() {
		t.Errorf("%+v", got)
	}
	update(t, db, func(tx *Tx) error { return tx.CancelAction(ctx, b, "cancelled") })
	if got := must[*Action](t)(db.Action(ctx, b.ID)); got.State != wire.ActionCancelled || !got.Cancelling {
		t.Errorf("%+v", got)
	}
	if got := must[[]*Action](t)(db.FindActions(ctx, string(b.ID[:8]), 2)); len(got) != 1 || got[0].ID != b.ID {
		t.Errorf("%+v", got)
	}
}

func TestRCPs(t *testing.T) {
	db := temp(t)
	update(t, db, func(tx *Tx) error {
		return tx.AddRCP(ctx, &RCP{Name: "dmz", Address: "h:1", Public: []string{"p:1"}, State: "pending"})
	})
	update(t, db, func(tx *Tx) error { return tx.AddRCP(ctx, &RCP{Name: "dmz-2", State: "pending"}) }) // two without a UUID
	p := must[*RCP](t)(db.RCP(ctx, "dmz"))
	stale := *p
	p.PartyID = wire.NewID()
	update(t, db, func(tx *Tx) error { return tx.SaveRCP(ctx, p) })
	if err := db.Update(ctx, func(_ context.Context, tx *Tx) error { return tx.SaveRCP(ctx, &stale) }); !errors.Is(err, ErrChanged) {
		t.Errorf("stale record: %v", err)
	}
	if got := must[*RCP](t)(db.RCPByID(ctx, p.PartyID)); got.Name != "dmz" || got.Public[0] != "p:1" {
		t.Errorf("%+v", got)
	}
	if _, err := db.RCPByID(ctx, ""); !errors.Is(err, ErrNotFound) {
		t.Errorf("RCP without a UUID: %v", err)
	}
}

func TestRaisedGenerationLeadsEveryRevision(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sallyport.db")
	db := open(t, path)
	id := addNode(t, db, "n")
	put := func() wire.Revision {
		d := &Desired{NodeID: id}
		update(t, db, func(tx *Tx) error { return tx.PutDesired(ctx, d) })
		return d.Revision()
	}
	put()
	before := put()
	if err := db.RaiseGeneration(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if after := put(); after.Compare(before) <= 0 || after.Generation != 2 {
		t.Errorf("%s after %s", after, before)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if g := open(t, path).Installation().Generation; g != 2 {
		t.Errorf("generation %d after a restart", g)
	}
}

func TestTimesOfPeersThatNoYearHolds(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "web-1")
	for i, text := range []string{"9999-12-31T23:59:59-23:00", "0000-01-01T00:00:00+23:00"} {
		bad, err := time.Parse(time.RFC3339, text) // as JSON takes it
		if err != nil {
			t.Fatal(err)
		}
		hello := &wire.Hello{
			Party: wire.Party{ID: id, Role: wire.RoleNode}, Versions: wire.OwnVersions, NotAfter: bad, RenewAfter: bad,
			Policies: []wire.PolicyStatus{{Name: "p", State: wire.PolicyFailed, Since: bad}},
		}
		update(t, db, func(tx *Tx) error {
			_, err := tx.RecordHello(ctx, hello, 0)
			return err
		})
		nodes, err := db.Nodes(ctx)
		if err != nil || len(nodes) != 1 {
			t.Fatalf("one node's hello made the list of nodes unreadable: %v", err)
		}
		if _, err := nodes[0].NotAfter.UTC().MarshalJSON(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if _, err := db.PolicyStatus(ctx, id); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		up := event(int64(i+1), "", "normal")
		up.Event.Time = bad
		if st, err := db.StoreOutbox(ctx, id, "s", []wire.OutboxUp{up}); err != nil || st.New != 1 {
			t.Errorf("event at %s: %+v, %v", text, st, err)
		}
		for _, e := range events(t, db, EventFilter{}) {
			if _, err := e.Time.MarshalJSON(); err != nil {
				t.Errorf("%s: %v", text, err)
			}
		}
	}
}
