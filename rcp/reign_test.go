package rcp

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sallyport/internal/identity"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

func reignOf(gw *identity.Identity, installation string, generation int64) wire.Reign {
	return wire.Reign{TrustDomain: gw.TrustDomain(), Installation: installation, Generation: generation, Name: "x", Gateway: gw.ID(), Issued: time.Now().UTC()}
}

func signed(t *testing.T, id *identity.Identity, r wire.Reign) wire.Envelope {
	t.Helper()
	env, err := id.Sign(wire.TypeReign, r)
	if err != nil {
		t.Fatal(err)
	}
	return env
}

func payload(t *testing.T, env wire.Envelope) (r wire.Reign) {
	t.Helper()
	if err := json.Unmarshal(env.Payload, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestTheNewestReignIsKept(t *testing.T) {
	p := newPlant(t)
	data, _ := p.certified()
	r := p.start(data, nil)
	gwID := p.ca.Party(t, wire.RoleGateway)
	gw := mustUp(t, p, gwID, r.addr)
	k := p.talkTo(gwID, gw, r.party())
	uid := string(wire.NewID())
	var held wire.Envelope
	put := func(reign wire.Reign) wire.Reign {
		t.Helper()
		if got := k.do("PUT", wire.PathReign, signed(t, gwID, reign), &held); got != 200 {
			t.Fatalf("PUT: %d", got)
		}
		return payload(t, held)
	}
	if got := k.do("GET", wire.PathReign+uid, nil, nil); got != 404 {
		t.Errorf("nothing is held: %d", got)
	}
	first := reignOf(gwID, uid, 3)
	if got := put(first); got.Generation != 3 {
		t.Errorf("holds %+v", got)
	}
	if got := put(reignOf(gwID, uid, 2)); got.Generation != 3 {
		t.Errorf("an older one took the place of a newer one: %+v", got)
	}
	again := first
	again.Issued = first.Issued.Add(time.Hour)
	if got := put(again); !got.Issued.Equal(again.Issued) {
		t.Error("the same reign, signed anew, is not kept: its signer's leaf ends some day")
	}
	if got := put(first); !got.Issued.Equal(again.Issued) {
		t.Error("an older signature took the place of a newer one")
	}
	later := first
	later.RestoredAt, later.Name = time.Now().UTC(), "later"
	if got := put(later); got.Name != "later" {
		t.Errorf("of two restorations to one generation the later does not count: %+v", got)
	}
	other := reignOf(gwID, string(wire.NewID()), 1)
	if got := put(other); got.Installation != other.Installation {
		t.Errorf("another installation: %+v", got)
	}
	var h wire.Hello
	if got := k.do("GET", wire.PathHello, nil, &h); got != 200 || len(h.Reigns) != 2 {
		t.Errorf("hello: %d %+v", got, h.Reigns)
	}

	// What no gateway of ours says of itself is refused.
	node, sibling, foreign := p.ca.Party(t, wire.RoleNode), p.ca.Party(t, wire.RoleRCP), identitytest.NewCA(t).Party(t, wire.RoleGateway)
	stolen := reignOf(gwID, uid, 9)
	short := reignOf(gwID, "not a uuid", 9)
	for name, env := range map[string]wire.Envelope{
		"a node's":              signed(t, node, reignOf(node, uid, 9)),
		"an RCP's":              signed(t, sibling, reignOf(sibling, uid, 9)),
		"another trust domain":  signed(t, foreign, reignOf(foreign, uid, 9)),
		"in another's name":     signed(t, p.ca.Party(t, wire.RoleGateway), stolen),
		"no installation":       signed(t, gwID, short),
		"generation 0":          signed(t, gwID, reignOf(gwID, uid, 0)),
		"another kind of paper": func() wire.Envelope { e, _ := gwID.Sign(wire.TypeUnlock, stolen); return e }(),
		"changed": func() wire.Envelope {
			e := signed(t, gwID, reignOf(gwID, uid, 3))
			e.Payload, _ = json.Marshal(stolen)
			return e
		}(),
	} {
		if got := k.do("PUT", wire.PathReign, env, nil); got != 422 {
			t.Errorf("%s: %d", name, got)
		}
	}
	// There is room for some, not for all.
	for range maxReigns {
		if k.do("PUT", wire.PathReign, signed(t, gwID, reignOf(gwID, string(wire.NewID()), 1)), nil) == 507 {
			break
		}
	}
	if n := len(r.reigns.marks()); n != maxReigns {
		t.Errorf("%d installations are kept", n)
	}

	// It outlives a restart.
	kept, err := openReigns(filepath.Join(data, "rcp"))
	if err != nil {
		t.Fatal(err)
	}
	if env, ok := kept.get(uid); !ok || payload(t, env).Name != "later" {
		t.Errorf("after a restart: %v", ok)
	}
	if _, err := gwID.VerifyEnvelope(held, wire.TypeReign, wire.RoleGateway, new(wire.Reign)); err != nil {
		t.Errorf("what is given out does not verify: %v", err)
	}
}

func TestGatewaysAreToldOfANewReign(t *testing.T) {
	p := newPlant(t)
	r := p.rcp(nil)
	gwID := p.ca.Party(t, wire.RoleGateway)
	gw := mustUp(t, p, gwID, r.addr)
	k := p.talkTo(gwID, gw, r.party())
	uid := string(wire.NewID())
	if got := k.do("PUT", wire.PathReign, signed(t, gwID, reignOf(gwID, uid, 1)), nil); got != 200 {
		t.Fatal(got)
	}
	w := p.watch(mustUp(t, p, gwID, r.addr))
	if got := k.do("PUT", wire.PathReign, signed(t, gwID, reignOf(gwID, uid, 2)), nil); got != 200 {
		t.Fatal(got)
	}
	w.until("a line tells of the new reign", func(v view) bool { return v.reigns == 1 })
}

func TestDamagedReigns(t *testing.T) {
	for _, text := range []string{"x", `[{"payload":"eA=="}]`} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, fileReigns), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openReigns(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
