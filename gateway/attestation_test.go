package gateway

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/api"
	"sallyport/internal/attest"
	"sallyport/internal/attest/attesttest"
	"sallyport/internal/enroll"
	"sallyport/internal/wire"
)

// vouched starts a party for which a device vouches; it waits without a token.
func (d *desk) vouched(certFile, keyFile, name string) *applicant {
	d.t.Helper()
	d.device = deviceIn(certFile, keyFile)
	defer func() { d.device = nil }()
	return d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), name)
}

// deviceIn vouches with what the files of a device hold.
func deviceIn(certFile, keyFile string) func(wire.AttestationStatement) (*wire.Envelope, error) {
	return func(s wire.AttestationStatement) (*wire.Envelope, error) {
		device, err := attest.Load(certFile, keyFile)
		if err != nil {
			return nil, err
		}
		return device.Sign(s)
	}
}

func indented(b []byte) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "\n    ") + "\n"
}

// factoryRule is a rule for the devices of a factory.
func factoryRule(f *attesttest.Factory, more string) string {
	return "kind: rule\nname: factory\nset: {from: factory}\nattestation:\n  type: x509\n  ca: |\n" + indented(attesttest.PEM(f.CA)) + more
}

// cnTwice are two common names, where one names a device.
func cnTwice() []pkix.AttributeTypeAndValue {
	cn := asn1.ObjectIdentifier{2, 5, 4, 3}
	return []pkix.AttributeTypeAndValue{{Type: cn, Value: "camera-6"}, {Type: cn, Value: "pump-6"}}
}

// TestDeviceVouches: a device of the factory comes in without a token, and
// others wait.
func TestDeviceVouches(t *testing.T) {
	d := newDesk(t)
	f, other := attesttest.NewFactory(t, "Acme"), attesttest.NewFactory(t, "Elsewhere")
	d.rules(factoryRule(f, "  subject: {CN: 'pump-*', O: Device makers}\n  name: CN\n"), false)

	certFile, keyFile, leaf := f.Device(t, "pump-1", nil)
	a := d.vouched(certFile, keyFile, "pump-1")
	d.see(a)
	d.expect(a, enroll.StateEnrolled, "")
	list := d.requests(api.RequestDelivered)
	if len(list) != 1 || list[0].Rule != "factory" || list[0].DeviceKey != wire.KeyOf(leaf) {
		t.Fatalf("requests %+v", list)
	}
	if v := requestView(list[0]); v.Device == nil || v.Device.Serial != leaf.SerialNumber.Text(16) || !strings.Contains(v.Device.Subject, "CN=pump-1") {
		t.Errorf("device %+v", v.Device)
	}
	if tags, err := d.store.NodeTags(t.Context(), a.id.ID()); err != nil || !strings.Contains(fmt.Sprint(tags), "factory") {
		t.Errorf("tags %v, %v", tags, err)
	}

	waits := func(what string, a *applicant, code, why string) {
		t.Helper()
		d.see(a)
		d.expect(a, enroll.StateWaiting, code)
		if s := a.Status(); !strings.Contains(s.Reason, why) {
			t.Errorf("%s: %q, want %q", what, s.Reason, why)
		}
	}
	device := func(f *attesttest.Factory, cn, name string, change func(*x509.Certificate)) *applicant {
		t.Helper()
		certFile, keyFile, _ := f.Device(t, cn, change)
		return d.vouched(certFile, keyFile, name)
	}
	waits("another factory", device(other, "pump-2", "pump-2", nil), wire.EnrollManual, attest.ErrIssuer.Error())
	waits("an expired device", device(f, "pump-3", "pump-3", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), wire.EnrollManual, "expired")
	waits("another kind of device", device(f, "camera-1", "camera-1", nil), wire.EnrollManual, "no CN that fits")
	waits("another name than its own", device(f, "pump-4", "pump-5", nil), wire.EnrollManual, "not the one that the device certificate gives")
	waits("two names in one", device(f, "pump-6", "pump-6", func(c *x509.Certificate) { c.Subject.ExtraNames = append(c.Subject.ExtraNames, cnTwice()...) }), wire.EnrollManual, "no CN that fits")
	waits("a comma in a name", device(f, "camera,CN=pump-7", "pump-7", nil), wire.EnrollManual, "no CN that fits")
	waits("no device", d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), "pump-8"), wire.EnrollManual, "an operator has to grant")

	// One device is one node, whatever name it has; and names stay taken.
	waits("the same name again", d.vouched(certFile, keyFile, "pump-1"), wire.EnrollNameInUse, "belongs to a live node")
	d.rules(factoryRule(f, ""), false)
	waits("the same device again", d.vouched(certFile, keyFile, "pump-9"), wire.EnrollDeviceInUse, "pump-1")
	d.device = deviceIn(certFile, keyFile)
	d.enrolled(d.join(api.CreateJoin{}), "pump-11") // its token grants by itself
	d.device = nil
	n, err := d.store.Node(t.Context(), a.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, false); err != nil {
		t.Fatal(err)
	}
	waits("after it was revoked", d.vouched(certFile, keyFile, "pump-12"), wire.EnrollDeviceInUse, "revoked node pump-1")
	if n, err = d.store.Node(t.Context(), n.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := d.revokeNode(t.Context(), n, true); err != nil {
		t.Fatal(err)
	}
	again := d.vouched(certFile, keyFile, "pump-10")
	d.see(again)
	d.expect(again, enroll.StateEnrolled, "")
}

// TestDeviceGoesWithItsNode: what takes a node's place by a code for its name, as
// after `node reidentify`, has the device of that node: a copy of the machine does
// not come in by it beside the new one.
func TestDeviceGoesWithItsNode(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	f := attesttest.NewFactory(t, "Acme")
	d.rules(factoryRule(f, "allow: [env=*]\n"), false)
	certFile, keyFile, leaf := f.Device(t, "pump-1", nil)
	d.see(d.vouched(certFile, keyFile, "pump-1"))
	d.device = deviceIn(certFile, keyFile)
	next := d.enrolled(d.join(api.CreateJoin{Name: "pump-1", Replace: true, AllowTags: []string{"env=*"}}), "")
	d.device = nil
	q, err := d.store.LastRequest(t.Context(), next.id.KeyHash())
	if err != nil || q.Rule != "factory" || q.DeviceKey != wire.KeyOf(leaf) {
		t.Errorf("request %+v %v", q, err)
	}
	if n, err := d.store.Node(t.Context(), next.id.ID()); err != nil || len(n.AllowTags) != 1 {
		t.Errorf("node %+v %v", n, err)
	}
	d.rules(factoryRule(f, ""), false)
	twin := d.vouched(certFile, keyFile, "pump-2")
	d.see(twin)
	d.expect(twin, enroll.StateWaiting, wire.EnrollDeviceInUse)
}

// TestRuleIsRehearsedForASuccessor: the dry run says of a device what is done.
func TestRuleIsRehearsedForASuccessor(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	f := attesttest.NewFactory(t, "Acme")
	d.rules(factoryRule(f, ""), false)
	certFile, keyFile, _ := f.Device(t, "pump-1", nil)
	d.see(d.vouched(certFile, keyFile, "pump-1"))
	code := d.join(api.CreateJoin{Name: "pump-1", Replace: true})
	bound := "joins: [" + mustParse(t, code).TokenID + "]\nnames: [%s]\n"
	d.rules(factoryRule(f, fmt.Sprintf(bound, "other")), false)
	d.device = deviceIn(certFile, keyFile)
	next := d.party(wire.RoleNode, code, "")
	d.device = nil
	d.see(next)
	d.expect(next, enroll.StateWaiting, wire.EnrollNoRule)
	for _, dry := range []bool{true, false} {
		if out := d.rules(factoryRule(f, fmt.Sprintf(bound, "pump-1")), dry); len(out.Grants) != 1 || out.Grants[0].Why != "" {
			t.Errorf("dry run %v: %+v", dry, out.Grants)
		}
	}
	d.see(next)
	d.expect(next, enroll.StateEnrolled, "")
}

// TestRecordedStatementIsWorthNothing: whoever has seen a device vouch, in a
// session or in a database, cannot use it for a key of his own, nor again.
func TestRecordedStatementIsWorthNothing(t *testing.T) {
	d := newDesk(t)
	f := attesttest.NewFactory(t, "Acme")
	certFile, keyFile, _ := f.Device(t, "pump-1", nil)
	honest := d.vouched(certFile, keyFile, "pump-1")
	var recorded *wire.Envelope
	honest.bend = func(r *http.Request, w *httptest.ResponseRecorder) bool {
		if r.Method != http.MethodGet {
			return false
		}
		honest.Handler(nil).ServeHTTP(w, r)
		var req wire.EnrollRequest
		if err := json.Unmarshal(w.Body.Bytes(), &req); err != nil {
			t.Error(err)
		}
		recorded = req.Attestation
		return true
	}
	d.see(honest) // no rule yet: it waits
	d.expect(honest, enroll.StateWaiting, wire.EnrollManual)
	if recorded == nil {
		t.Fatal("no statement was made")
	}
	d.rules(factoryRule(f, ""), false)

	thief := d.party(wire.RoleNode, d.join(api.CreateJoin{Manual: true}), "pump-1")
	claiming(t, thief, func(r *wire.EnrollRequest) { r.Attestation, r.ID = recorded, honest.id.ID() })
	d.see(thief)
	d.expect(thief, enroll.StateWaiting, wire.EnrollManual)
	if s := thief.Status(); !strings.Contains(s.Reason, "another") {
		t.Errorf("reason %q", s.Reason)
	}
	// The device itself, with what it said in another session.
	honest.bend = nil
	claiming(t, honest, func(r *wire.EnrollRequest) { r.Attestation = recorded })
	d.see(honest)
	d.expect(honest, enroll.StateWaiting, wire.EnrollManual)
	if s := honest.Status(); !strings.Contains(s.Reason, "another challenge") {
		t.Errorf("reason %q", s.Reason)
	}
	honest.bend = nil
	d.see(honest)
	d.expect(honest, enroll.StateEnrolled, "")
}

// TestDeviceRuleRehearsal: the dry run says which waiting requests a rule would
// grant, and why; a revoked device is refused.
func TestDeviceRuleRehearsal(t *testing.T) {
	d := newDesk(t)
	f := attesttest.NewFactory(t, "Acme")
	certFile, keyFile, leaf := f.Device(t, "pump-1", nil)
	good := d.vouched(certFile, keyFile, "pump-1")
	certFile, keyFile, stolen := f.Device(t, "pump-2", nil)
	bad := d.vouched(certFile, keyFile, "pump-2")
	d.see(good)
	d.see(bad)
	crl := "  crl: |\n" + indented(f.CRLs(t, time.Now().Add(time.Hour), stolen))
	out := d.rules(factoryRule(f, crl), true)
	verdicts := map[string]api.RuleGrant{}
	for _, g := range out.Grants {
		verdicts[g.Request.Name] = g
	}
	if g := verdicts["pump-1"]; g.Rule != "factory" || g.Why != "" || !strings.Contains(g.Proof, "CN=pump-1") {
		t.Errorf("pump-1: %+v", g)
	}
	if g := verdicts["pump-2"]; g.Rule != "" || !strings.Contains(g.Why, "revoked") {
		t.Errorf("pump-2: %+v", g)
	}
	d.expect(good, enroll.StateWaiting, wire.EnrollManual)
	d.rules(factoryRule(f, crl), false)
	if len(d.looked) != 1 || d.looked[0] != good.id.KeyHash() {
		t.Errorf("looked at %v", d.looked)
	}
	d.see(good)
	d.expect(good, enroll.StateEnrolled, "")
	d.see(bad)
	d.expect(bad, enroll.StateWaiting, wire.EnrollManual)
	// The same by its serial number, and by a list that is out of date.
	for name, more := range map[string]string{
		"revoked":        "  revoked: ['" + stolen.SerialNumber.Text(16) + "']\n",
		"no current CRL": "  crl: |\n" + indented(f.CRLs(t, time.Now().Add(-time.Minute), leaf)),
	} {
		out := d.rules(factoryRule(f, more), true)
		if len(out.Grants) != 1 || out.Grants[0].Rule != "" || !strings.Contains(out.Grants[0].Why, name) {
			t.Errorf("%s: %+v", name, out.Grants)
		}
	}
	for text, why := range map[string]string{
		"kind: rule\nname: a\nattestation: {type: tpm, ca: x}\n":           "want x509",
		"kind: rule\nname: a\nattestation: {type: x509, ca: x}\n":          "certificates in PEM",
		"kind: rule\nname: a\nattestation: {type: x509}\n":                 "has no ca",
		factoryRule(f, "  subject: {CNAME: x}\n"):                          "want one of",
		factoryRule(f, "  sans: ['pump.example.com']\n"):                   "which kind of name",
		factoryRule(f, "  name: hostname\n"):                               "want one of",
		factoryRule(f, "  revoked: [zz]\n"):                                "serial number",
		factoryRule(f, "  crl: |\n"+indented(attesttest.PEM(f.CA))):        "something else than CRLs",
		strings.Replace(factoryRule(f, ""), "type: x509", "kind: x509", 1): "unknown key",
	} {
		_, err := d.applyRules(t.Context(), api.ApplyRules{DryRun: true, Manifests: []api.Manifest{{File: "r.yaml", Text: text}}})
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
	}
}
