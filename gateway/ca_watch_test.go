package gateway

import (
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

func TestIssuersThatEnd(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Now()
	for _, c := range []struct {
		kind       string
		life, left time.Duration
		want       wire.Severity
	}{
		{"intermediate", 3650 * day, 91 * day, wire.SeverityNormal},
		{"intermediate", 3650 * day, 90 * day, wire.SeverityWarning},
		{"intermediate", 3650 * day, 30 * day, wire.SeverityMajor},
		{"intermediate", 3650 * day, 7 * day, wire.SeverityCritical},
		{"intermediate", 3650 * day, -day, wire.SeverityCritical},
		{"intermediate", 40 * day, 11 * day, wire.SeverityNormal}, // one that another program replaces every month
		{"intermediate", 40 * day, 10 * day, wire.SeverityWarning},
		{"intermediate", 40 * day, 5 * day, wire.SeverityMajor},
		{"root", 7300 * day, 361 * day, wire.SeverityNormal},
		{"root", 7300 * day, 360 * day, wire.SeverityWarning},
		{"root", 7300 * day, 120 * day, wire.SeverityMajor},
	} {
		i := wire.CAIssuer{N: 3, NotBefore: now.Add(c.left - c.life), NotAfter: now.Add(c.left)}
		got := ending(now, c.kind, i, "")
		if got.severity != c.want || (c.want != wire.SeverityNormal) != strings.Contains(got.fix, "ca rotate "+c.kind) {
			t.Errorf("%s of %s with %s left: %+v, want %s", c.kind, c.life, c.left, got, c.want)
		}
	}
	if got := ending(now, "root", wire.CAIssuer{N: 1, NotBefore: now.Add(-100 * day), NotAfter: now.Add(day)}, "https://ca.example"); !strings.Contains(got.text, "https://ca.example") || strings.Contains(got.text, "ca rotate") {
		t.Errorf("of an external CA: %+v", got)
	}
	if got := ending(now, "root", wire.CAIssuer{N: 1}, ""); got.severity != wire.SeverityNormal {
		t.Errorf("of one whose end is not known: %+v", got)
	}
}

func TestDoorsThatEnd(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Now()
	cert := func(life, left time.Duration) *x509.Certificate {
		return &x509.Certificate{NotBefore: now.Add(left - life), NotAfter: now.Add(left)}
	}
	for _, c := range []struct {
		life, left time.Duration
		want       wire.Severity
	}{
		{3650 * day, 89 * day, wire.SeverityNormal}, // one of our own is replaced now
		{3650 * day, 80 * day, wire.SeverityWarning},
		{3650 * day, 30 * day, wire.SeverityMajor},
		{3650 * day, 7 * day, wire.SeverityCritical},
		{3650 * day, -day, wire.SeverityCritical},
		{100 * day, 26 * day, wire.SeverityNormal},
		{100 * day, 25 * day, wire.SeverityWarning},
	} {
		for _, chain := range [][]*x509.Certificate{
			{cert(c.life, c.left), cert(7300*day, 5000*day)},
			{cert(3650*day, 3000*day), cert(c.life, c.left)}, // what is above it ends first
		} {
			got := doorsEnding(now, chain)
			if got.severity != c.want || (c.want != wire.SeverityNormal) != strings.Contains(got.fix, "ca import --doors") || !strings.Contains(got.text, now.Add(c.left).UTC().Format(time.RFC3339)) {
				t.Errorf("of %s with %s left: %+v, want %s", c.life, c.left, got, c.want)
			}
		}
	}
}

// awayCA is an authority in another process.
type awayCA struct {
	Issuer
	since time.Time
}

func (c *awayCA) Away() time.Time { return c.since }

func (c *awayCA) Reach(context.Context) error {
	if c.since.IsZero() {
		return nil
	}
	return errors.New("ask the certificate authority at ca:9443: nobody")
}

// TestConcernsAboutTheCA: they are told once, over restarts too, again when they
// become worse, and when they are over.
func TestConcernsAboutTheCA(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca, remote := d.rolls(), &awayCA{}
	s := &Server{store: d.store, id: d.id, ca: remote, enrolment: d.enrolment}
	const day = 24 * time.Hour
	told := map[string]wire.Severity{}
	expect := func(when, key string, severity wire.Severity, open int, text string) {
		t.Helper()
		if err := s.tellConcerns(t.Context(), told); err != nil {
			t.Fatal(err)
		}
		events, err := d.store.Events(t.Context(), store.EventFilter{Own: true, Key: key, State: api.EventOpen, Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		if len(events) != open || open > 0 && (events[0].Severity != severity || !strings.Contains(events[0].Text, text) || events[0].Count != 1) {
			t.Errorf("%s: %+v", when, events)
		}
		switch c := s.checkAuthority(t.Context()); {
		case !remote.since.IsZero(): // the doctor asks, and does not wait for ten minutes
			if c.OK || !strings.Contains(c.Detail, "ca:9443") || !strings.Contains(c.Fix, "sallyport run pki") {
				t.Errorf("%s: the doctor finds %+v", when, c)
			}
		case c.OK != (open == 0) || !strings.Contains(c.Detail, text):
			t.Errorf("%s: the doctor finds %+v", when, c)
		}
	}
	life := func(left time.Duration) {
		ca.state.Intermediates[0].NotBefore, ca.state.Intermediates[0].NotAfter = time.Now().Add(left-3650*day), time.Now().Add(left)
	}
	// What a node sends under such a key is its own affair.
	node := wire.NewID()
	if err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.AddNode(ctx, &store.Node{ID: node, Name: "web", Tenant: store.DefaultTenant})
	}); err != nil {
		t.Fatal(err)
	}
	var sent []wire.OutboxUp
	for i, key := range []string{"away", "intermediate"} {
		sent = append(sent, wire.OutboxUp{Event: &wire.Event{ID: wire.NewEventID(), Seq: int64(i + 1), Time: time.Now(), Severity: wire.SeverityMajor, Key: keyCA + key, Text: "nothing to see here"}})
	}
	if _, err := d.store.StoreOutbox(t.Context(), node, "spool", sent); err != nil {
		t.Fatal(err)
	}
	life(1000 * day)
	expect("all is well", keyCA+"intermediate", "", 0, "intermediate 1 ends on")
	life(80 * day)
	expect("80 days", keyCA+"intermediate", wire.SeverityWarning, 1, "ca rotate intermediate")
	expect("still", keyCA+"intermediate", wire.SeverityWarning, 1, "ca rotate intermediate")
	told = map[string]wire.Severity{}
	expect("after a restart", keyCA+"intermediate", wire.SeverityWarning, 1, "ca rotate intermediate")
	life(3650 * day)
	expect("replaced", keyCA+"intermediate", "", 0, "intermediate 1 ends on")
	remote.since = time.Now().Add(-time.Minute)
	expect("started again", keyCA+"away", "", 0, "the certificate authority answers")
	remote.since = time.Now().Add(-time.Hour)
	expect("away", keyCA+"away", wire.SeverityMajor, 1, "has not answered since")
	remote.since = time.Time{}
	expect("back", keyCA+"away", "", 0, "the certificate authority answers")
	ca.state.External = "https://ca.example:9000"
	expect("an external CA", keyCA+"external", "", 0, "ca.example:9000 answers")
	ca.state.Problem, ca.state.Since = "it refuses: not today", time.Now().Add(-time.Minute)
	if err := s.tellConcerns(t.Context(), told); err != nil {
		t.Fatal(err)
	}
	if c := s.checkAuthority(t.Context()); c.OK || !strings.Contains(c.Detail, "not today") || !strings.Contains(c.Fix, "SALLYPORT_PKI_CA_KEY_FILE") { // the doctor does not wait
		t.Errorf("it has refused for a minute: the doctor finds %+v", c)
	}
	ca.state.Since = time.Now().Add(-time.Hour)
	expect("it refuses", keyCA+"external", wire.SeverityMajor, 1, "not today")
	ca.state.Problem, ca.state.Since = "", time.Time{}
	expect("it issues again", keyCA+"external", "", 0, "ca.example:9000 answers")
	ca.state.External, ca.state.Signer = "", "/run/signer.sock"
	expect("a signer", keyCA+"signer", "", 0, "signer.sock answers")
	ca.state.Problem, ca.state.Since = "nobody is there", time.Now().Add(-time.Hour)
	expect("it is away", keyCA+"signer", wire.SeverityMajor, 1, "nobody is there")
	told = map[string]wire.Severity{}
	ca.state.Signer, ca.state.Problem, ca.state.Since = "", "", time.Time{}
	if err := s.tellConcerns(t.Context(), told); err != nil {
		t.Fatal(err)
	}
	if open, err := s.standsOpen(t.Context(), keyCA+"signer"); err != nil || open != wire.SeverityNormal {
		t.Errorf("the trouble of a signer that is not used any more stands open: %s, %v", open, err)
	}
	ca.state.Signer = "/run/signer.sock"
	expect("it is back", keyCA+"signer", "", 0, "signer.sock answers")
}

// endingDoors are doors of which only the chain is asked for.
type endingDoors struct {
	doors.Authority

	chain []*x509.Certificate
}

func (d endingDoors) Chain() []*x509.Certificate { return d.chain }

func TestMetricsOfWhatEnds(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	ca := d.rolls()
	ca.state.Intermediates[0].NotAfter, ca.state.Roots[0].NotAfter = time.Unix(2e9, 0), time.Unix(3e9, 0)
	s := &Server{id: d.id, ca: &awayCA{since: time.Now()}, enrolment: d.enrolment}
	others := *d.ca.Inter
	others.NotAfter = time.Unix(4e9, 0)
	s.doors = &doorway{ca: endingDoors{chain: []*x509.Certificate{&others}}}
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(ends{s}); err != nil {
		t.Fatal(err)
	}
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, family := range all {
		for _, m := range family.GetMetric() {
			name := family.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetGauge().GetValue()
		}
	}
	want := map[string]float64{
		"sallyport_gateway_ca_away":                                     1,
		"sallyport_gateway_ca_not_after_seconds intermediate 1 issuing": 2e9,
		"sallyport_gateway_ca_not_after_seconds root 1 issuing":         3e9,
		"sallyport_gateway_ca_not_after_seconds doors  issuing":         4e9,
		"sallyport_gateway_certificate_not_after_seconds":               float64(s.id.NotAfter().Unix()),
	}
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
