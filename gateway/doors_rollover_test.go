package gateway

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// turningDoors issue below one root, and have issued below another.
type turningDoors struct {
	doors.Authority

	cas []*identitytest.CA // the one that issues first
}

func (d turningDoors) Trust() (inters, roots []*x509.Certificate) {
	for _, c := range d.cas {
		roots = append(roots, c.Root)
	}
	return d.Doors(), roots
}

func (d turningDoors) Doors() (out []*x509.Certificate) {
	for _, c := range d.cas {
		out = append(out, c.Inter)
	}
	return out
}

// A root that is given up takes certificates of other programs along: they are
// told, but those that were renewed, revoked, or are the doors' own.
func TestDoorsOfARootThatIsGivenUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	old, next := identitytest.NewCA(t), identitytest.NewCA(t)
	before, after := wire.KeyOf(old.Inter), wire.KeyOf(next.Inter)
	w.update(func(ctx context.Context, tx *store.Tx) error {
		var errs []error
		for serial, c := range map[string]store.Certificate{
			"a1": {Issuer: before, Door: "acme", Names: []string{"left.example", "renewed.example"}},
			"a2": {Issuer: before, Door: "acme", Names: []string{"renewed.example"}},
			"a3": {Issuer: after, Door: "acme", Names: []string{"renewed.example", "new.example"}},
			"a4": {Issuer: before, Door: "est", Names: []string{"revoked.example"}},
			"a5": {Issuer: before, Door: doorSelf, Names: []string{"doors.sallyport"}},
			"a6": {Issuer: before, Names: []string{"a party"}},
			"a7": {Issuer: before, Door: "est", Names: []string{"over.example"}, NotAfter: time.Now().Add(-time.Minute)},
			"a8": {Issuer: wire.HashSPKI([]byte("imported")), Door: "est", Names: []string{"elsewhere.example"}},
		} {
			c.Serial, c.KeyHash = serial, wire.HashSPKI([]byte(serial))
			if c.NotAfter.IsZero() {
				c.NotAfter = time.Now().Add(time.Hour)
			}
			errs = append(errs, tx.AddCertificate(ctx, &c))
		}
		return errors.Join(append(errs, tx.RevokeCertificate(ctx, before, "a4", 0))...)
	})
	s := &Server{store: w.db, log: testLog(t), fleet: newFleet(defaultTimings, ""), doors: &doorway{ca: turningDoors{cas: []*identitytest.CA{next, old}}}}
	told := func(root *x509.Certificate, now bool) (serials string, c api.CAChange) {
		t.Helper()
		if err := s.tellDoors(t.Context(), &c, wire.KeyOf(root), now); err != nil {
			t.Fatal(err)
		}
		for _, c := range c.Certificates {
			serials += c.Serial
		}
		return serials, c
	}
	if got, c := told(old.Root, true); got != "a1" || len(c.Notes) != 1 || !strings.Contains(someCertificates(c.Certificates), "left.example") {
		t.Errorf("%s %q", got, c.Notes)
	}
	if got, c := told(next.Root, false); got != "a3" || !strings.Contains(strings.Join(c.Notes, " "), "ca finish") {
		t.Errorf("in a rehearsal: %s %q", got, c.Notes)
	}
	// An imported intermediate stays, whatever becomes of the root.
	if got, c := told(next.Root, true); got != "" || len(c.Notes) != 1 || !strings.Contains(c.Notes[0], "ca csr --doors") {
		t.Errorf("the issuing one: %s %q", got, c.Notes)
	}
	// After an abort, what the other root certified is the newer: an older one
	// of the same name is no program's any more.
	w.update(func(ctx context.Context, tx *store.Tx) error {
		return tx.AddCertificate(ctx, &store.Certificate{Issuer: before, Serial: "a9", Door: "est", KeyHash: before, Names: []string{"new.example"}, NotAfter: time.Now().Add(time.Hour)})
	})
	if got, _ := told(old.Root, true); got != "a9a1" {
		t.Errorf("after an abort: %s", got)
	}
	s.doors = nil
	if got, c := told(old.Root, true); got != "" || len(c.Notes) != 0 {
		t.Errorf("while they are closed: %s %q", got, c.Notes)
	}
}
