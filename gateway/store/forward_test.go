package store

import (
	"context"
	"errors"
	"maps"
	"testing"

	"sallyport/gateway/bus"
	"sallyport/internal/wire"
)

func TestForwards(t *testing.T) {
	db := temp(t)
	alice := WithActor(ctx, Actor{Who: "alice", Origin: "unix socket"})
	add := func(listen, target string) error {
		return db.Update(alice, func(ctx context.Context, tx *Tx) error {
			return tx.AddForward(ctx, &Forward{Listen: listen, Tenant: DefaultTenant, Target: target})
		})
	}
	for _, listen := range []string{"127.0.0.1:2", "127.0.0.1:1"} {
		if err := add(listen, "web"); err != nil {
			t.Fatal(err)
		}
	}
	if err := add("127.0.0.1:1", "db"); !errors.Is(err, ErrExists) {
		t.Errorf("an address that is taken: %v", err)
	}
	all := must[[]*Forward](t)(db.Forwards(ctx))
	if len(all) != 2 || all[0].Listen != "127.0.0.1:1" || all[0].Target != "web" || all[0].CreatedBy != "alice" || all[0].CreatedAt.IsZero() {
		t.Fatalf("%+v", all)
	}
	update(t, db, func(tx *Tx) error { return tx.RemoveForward(ctx, "127.0.0.1:1") })
	err := db.Update(ctx, func(ctx context.Context, tx *Tx) error { return tx.RemoveForward(ctx, "127.0.0.1:1") })
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if all := must[[]*Forward](t)(db.Forwards(ctx)); len(all) != 1 {
		t.Errorf("%d left", len(all))
	}
}

func TestDesiredTargetsAreReadOn(t *testing.T) {
	db := temp(t)
	a, b := addNode(t, db, "a"), addNode(t, db, "b")
	put := func(id wire.ID, policies ...wire.Policy) {
		d := &Desired{NodeID: id}
		for _, p := range policies {
			d.Content.Policies = append(d.Content.Policies, DesiredPolicy{Policy: p})
		}
		update(t, db, func(tx *Tx) error { return tx.PutDesired(ctx, d) })
	}
	web := wire.Policy{Name: "web", Type: wire.PolicyTarget, Digest: "d1"}
	check := wire.Policy{Name: "disk", Type: wire.PolicyCheck, Digest: "d2"}
	put(a, web, check)
	put(b, check)
	rows, last, err := db.DesiredTargets(ctx, 0)
	if err != nil || len(rows) != 2 || rows[0].NodeID != a || !maps.Equal(rows[0].Targets, map[string]string{"web": "d1"}) || rows[1].Targets != nil {
		t.Fatalf("%+v, %v", rows, err)
	}
	if rows, again, err := db.DesiredTargets(ctx, last); err != nil || len(rows) != 0 || again != last {
		t.Fatalf("nothing is new: %+v, %d, %v", rows, again, err)
	}
	wakes, cancel := db.bus.Subscribe(bus.Targets)
	defer cancel()
	put(a, check)
	select {
	case <-wakes:
	default:
		t.Error("a new desired state wakes nobody")
	}
	if rows, _, err := db.DesiredTargets(ctx, last); err != nil || len(rows) != 1 || rows[0].NodeID != a || len(rows[0].Targets) != 0 {
		t.Fatalf("the target is gone: %+v, %v", rows, err)
	}
}

func TestTargetStatuses(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "a")
	wakes, cancel := db.bus.Subscribe(bus.Targets)
	defer cancel()
	set := func(wantWake bool, statuses ...wire.PolicyStatus) {
		t.Helper()
		update(t, db, func(tx *Tx) error { return tx.SetPolicyStatus(ctx, id, statuses) })
		woken := false
		select {
		case <-wakes:
			woken = true
		default:
		}
		if woken != wantWake {
			t.Errorf("woken %v, want %v", woken, wantWake)
		}
	}
	disk := wire.PolicyStatus{Name: "disk", Type: wire.PolicyCheck, State: wire.PolicyApplied}
	web := wire.PolicyStatus{Name: "web", Type: wire.PolicyTarget, State: wire.PolicyApplied}
	set(false, disk)
	set(true, disk, web)
	set(false, disk, web)
	if all := must[[]PolicyStatus](t)(db.TargetStatuses(ctx)); len(all) != 1 || all[0].Policy != "web" || all[0].NodeID != id {
		t.Fatalf("%+v", all)
	}
	web.State = wire.PolicyFailed
	set(true, disk, web)
	set(true, disk)
	if all := must[[]PolicyStatus](t)(db.TargetStatuses(ctx)); len(all) != 0 {
		t.Fatalf("%+v", all)
	}
}
