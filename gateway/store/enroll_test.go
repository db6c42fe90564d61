package store

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

func keyOf(c string) wire.KeyHash { return wire.KeyHash(strings.Repeat(c, 32)) }

func TestJoinIsUsedOncePerKey(t *testing.T) {
	db := temp(t)
	j := &Join{ID: string(wire.NewID()), Role: wire.RoleNode, Tenant: DefaultTenant, MaxUses: 2, ExpiresAt: time.Now().Add(time.Hour).UTC()}
	update(t, db, func(tx *Tx) error { return tx.AddJoin(ctx, j) })
	for _, c := range []struct {
		key  string
		want error
		used int
	}{{"aa", nil, 1}, {"aa", nil, 1}, {"bb", nil, 2}, {"cc", ErrExists, 2}, {"bb", nil, 2}} {
		err := db.Update(ctx, func(_ context.Context, tx *Tx) error { return tx.UseJoin(ctx, j.ID, keyOf(c.key), wire.NewID()) })
		if !errors.Is(err, c.want) {
			t.Errorf("key %s: %v, want %v", c.key, err, c.want)
		}
		if got := must[*Join](t)(db.Join(ctx, j.ID)); got.Used != c.used {
			t.Errorf("key %s: %d uses, want %d", c.key, got.Used, c.used)
		}
	}
	if !must[bool](t)(db.JoinUsed(ctx, j.ID, keyOf("aa"))) || must[bool](t)(db.JoinUsed(ctx, j.ID, keyOf("cc"))) {
		t.Error("uses are not bound to their keys")
	}
}

func TestRequestsAreFound(t *testing.T) {
	db := temp(t)
	add := func(name, key string) *Request {
		q := &Request{ID: string(wire.NewID()), Role: wire.RoleNode, PartyID: wire.NewID(), KeyHash: keyOf(key), Name: name, CSR: []byte{1}, State: api.RequestPending}
		update(t, db, func(tx *Tx) error { return tx.AddRequest(ctx, q) })
		return q
	}
	a, b := add("web", "aa"), add("web", "bb")
	old := add("db", "cc")
	update(t, db, func(tx *Tx) error { old.State = api.RequestDenied; return tx.SaveRequest(ctx, old) })
	again := add("db", "cc")
	for ref, want := range map[string]int{a.ID: 1, "web": 2, "db": 1, b.ID[:8]: 1, b.ID[:4]: 0, "nobody": 0, old.ID: 0} {
		if got := must[[]*Request](t)(db.FindRequests(ctx, ref)); len(got) != want {
			t.Errorf("%s: %d requests, want %d", ref, len(got), want)
		}
	}
	if got := must[*Request](t)(db.LastRequest(ctx, keyOf("cc"))); got.ID != again.ID {
		t.Errorf("last request %s, want %s", got.ID, again.ID)
	}
	if _, err := db.LastRequest(ctx, keyOf("dd")); !errors.Is(err, ErrNotFound) {
		t.Errorf("no request: %v", err)
	}
	update(t, db, func(tx *Tx) error {
		if n, err := tx.ExpireRequests(ctx, time.Now().Add(-time.Hour)); err != nil || n != 0 {
			t.Errorf("expired %d %v, want none", n, err)
		}
		n, err := tx.ExpireRequests(ctx, time.Now().Add(time.Hour))
		if n != 3 {
			t.Errorf("expired %d, want 3", n)
		}
		return err
	})
	if n, _, err := db.CountWaiting(ctx, ""); err != nil || n != 0 {
		t.Errorf("%d still wait: %v", n, err)
	}
	for before, want := range map[time.Duration]int64{-time.Hour: 0, time.Hour: 3} {
		if n, _ := forget(t, db.ForgetRequests, time.Now().Add(before)); n != want {
			t.Errorf("%d of those that expired before now %+v are dropped, want %d", n, before, want)
		}
	}
	if q := must[*Request](t)(db.Request(ctx, old.ID)); q.State != api.RequestDenied {
		t.Errorf("what an operator denied: %+v", q)
	}
}

func TestRevocationIsForEver(t *testing.T) {
	db := temp(t)
	party := wire.NewID()
	k := Key{KeyHash: keyOf("aa"), Role: wire.RoleNode, PartyID: party, Name: "web", IssuedAt: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	update(t, db, func(tx *Tx) error { return tx.PutKey(ctx, &k) })
	update(t, db, func(tx *Tx) error {
		n, err := tx.RevokeKeys(ctx, party, "stolen")
		if n != 1 {
			t.Errorf("revoked %d keys, want 1", n)
		}
		return err
	})
	k.RevokedAt = time.Time{}
	update(t, db, func(tx *Tx) error { return tx.PutKey(ctx, &k) })
	got := must[[]*Key](t)(db.RevokedKeys(ctx))
	if len(got) != 1 || got[0].Reason != "stolen" || got[0].RevokedAt.IsZero() {
		t.Errorf("revoked keys %+v", got)
	}
	for _, c := range []struct{ atLeast, want int64 }{{0, 1}, {0, 2}, {10, 11}, {3, 12}} {
		update(t, db, func(tx *Tx) error {
			n, err := tx.NextRevocations(ctx, c.atLeast)
			if n != c.want {
				t.Errorf("number %d, want %d", n, c.want)
			}
			return err
		})
	}
}

func TestCertificateOfNodeAndRCP(t *testing.T) {
	db := temp(t)
	id := addNode(t, db, "web")
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Microsecond)
	update(t, db, func(tx *Tx) error { return tx.AddRCP(ctx, &RCP{Name: "dmz", State: api.RCPPending, Source: RCPAdded}) })
	update(t, db, func(tx *Tx) error {
		return errors.Join(tx.SetNodeCertificate(ctx, id, keyOf("aa"), end, end), tx.SetRCPCertificate(ctx, "dmz", keyOf("bb"), end, end))
	})
	n, r := must[*Node](t)(db.Node(ctx, id)), must[*RCP](t)(db.RCP(ctx, "dmz"))
	if n.KeyHash != keyOf("aa") || !n.NotAfter.Equal(end) || r.KeyHash != keyOf("bb") || !r.RenewAfter.Equal(end) {
		t.Errorf("node %+v, rcp %+v", n, r)
	}
}

// Every pair of states: what the table does not name is refused by the
// database, whoever asks.
func TestRequestStates(t *testing.T) {
	db := temp(t)
	states := []string{api.RequestPending, api.RequestGranted, api.RequestDelivered, api.RequestDenied, api.RequestDiscarded, api.RequestFailed, api.RequestExpired}
	final := map[string]bool{api.RequestDenied: true, api.RequestDiscarded: true, api.RequestExpired: true, api.RequestDelivered: true}
	moves := 0
	for _, from := range states {
		for _, to := range states {
			q := &Request{ID: string(wire.NewID()), Role: wire.RoleNode, PartyID: wire.NewID(), KeyHash: keyOf("aa"), CSR: []byte{1}, State: from}
			err := db.Update(t.Context(), func(ctx context.Context, tx *Tx) error {
				if err := tx.AddRequest(ctx, q); err != nil {
					return err
				}
				q.State = to
				return tx.SaveRequest(ctx, q)
			})
			if (err == nil) != slices.Contains(requestMoves[to], from) {
				t.Errorf("%s to %s: %v", from, to, err)
			}
			if err := db.Update(t.Context(), func(ctx context.Context, tx *Tx) error {
				q.ID, q.State, q.KeyHash = string(wire.NewID()), from, wire.HashSPKI([]byte(from+to))
				return errors.Join(tx.AddRequest(ctx, q), tx.MoveRequest(ctx, q.KeyHash, to, "moved"))
			}); err != nil {
				t.Fatal(err)
			}
			if moved, err := db.Request(t.Context(), q.ID); err != nil || (moved.State == to && moved.Reason == "moved") != slices.Contains(requestMoves[to], from) {
				t.Errorf("%s moved to %s is %s, %q, %v", from, to, moved.State, moved.Reason, err)
			}
			if err == nil {
				moves++
				if final[from] && from != to {
					t.Errorf("%s is final, and became %s", from, to)
				}
			}
		}
	}
	if moves < 10 {
		t.Errorf("only %d moves are possible", moves)
	}
}
