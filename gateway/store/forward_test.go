package store

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

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

// A forward ends with the API token that it was made with, and the audit log says so.
func TestForwardsEndWithTheirToken(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	db := must[*DB](t)(Open(ctx, Config{Path: filepath.Join(t.TempDir(), "sallyport.db"), Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return now }}))
	t.Cleanup(func() { _ = db.Close() })
	update(t, db, func(tx *Tx) error {
		for i, id := range []string{"", "stays", "expires", "revoked"} {
			if err := tx.AddForward(ctx, &Forward{Listen: "127.0.0.1:" + strconv.Itoa(i), Tenant: DefaultTenant, Target: "web", TokenID: id}); err != nil {
				return err
			}
		}
		return errors.Join(
			tx.AddToken(ctx, &Token{ID: "stays", Hash: "1", ExpiresAt: now.Add(24 * time.Hour)}),
			tx.AddToken(ctx, &Token{ID: "expires", Hash: "2", ExpiresAt: now.Add(time.Hour)}),
			tx.AddToken(ctx, &Token{ID: "revoked", Hash: "3", ExpiresAt: now.Add(24 * time.Hour)}))
	})
	left := func(want ...string) {
		t.Helper()
		update(t, db, func(tx *Tx) error { return tx.EndForwards(ctx) })
		var ids []string
		for _, f := range must[[]*Forward](t)(db.Forwards(ctx)) {
			ids = append(ids, f.TokenID)
		}
		if !slices.Equal(ids, want) {
			t.Errorf("%q are left, want %q", ids, want)
		}
	}
	left("", "stays", "expires", "revoked")
	now = now.Add(time.Hour)
	left("", "stays", "revoked")
	update(t, db, func(tx *Tx) error { return tx.RevokeToken(ctx, "revoked") })
	left("", "stays")
	if log := must[[]AuditEntry](t)(db.AuditLog(ctx, AuditFilter{What: "target.unforward", Limit: 9})); len(log) != 2 || !strings.Contains(log[0].Detail, "revoked") {
		t.Errorf("%+v", log)
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
