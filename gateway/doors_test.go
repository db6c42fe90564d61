package gateway

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"sallyport/config"
	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
)

// Names are given for tags that operators or join codes set, and not for what
// a node says of itself.
func TestDoorNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	ctx := t.Context()
	given, claims, both := wire.NewID(), wire.NewID(), wire.NewID()
	err := w.db.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		for id, name := range map[wire.ID]string{given: "given", claims: "claims", both: "both"} {
			if err := tx.AddNode(ctx, &store.Node{ID: id, Name: name, State: wire.StateRunning}); err != nil {
				return err
			}
		}
		var errs []error
		for _, id := range []wire.ID{claims, both} {
			_, err := tx.RecordHello(ctx, &wire.Hello{Party: wire.Party{Role: wire.RoleNode, ID: id}, Tags: map[string]string{"site": "plant"}}, 0)
			errs = append(errs, err)
		}
		return errors.Join(append(errs, tx.SetJoinTags(ctx, given, map[string]string{"site": "plant"}), tx.TagNode(ctx, both, map[string]string{"site": "office"}, nil))...)
	})
	if err != nil {
		t.Fatal(err)
	}
	names, err := newDoorNames(w.db, config.NameRules{{Glob: "*.plant.example", Selector: "site=plant"}, {Glob: "all.example"}, {Glob: "*.office.example", Selector: "site=office"}, {Glob: "doors.*"}}, "doors.sallyport")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		node wire.ID
		want bool
	}{
		{"www.plant.example", given, true}, {"a.b.plant.example", given, true}, {"plant.example", given, false}, {"www.plant.example.org", given, false},
		{"www.plant.example", claims, false}, {"www.plant.example", both, false}, {"www.office.example", both, true},
		{"www.plant.example", "", false}, {"all.example", "", true}, {"all.example", claims, true}, {"all.example", wire.NewID(), true},
		{"www.plant.example", wire.NewID(), false}, {"doors.sallyport", given, false}, {"doors.example", given, true},
	} {
		err := names.allow(ctx, c.name, c.node)
		if (err == nil) != c.want || err != nil && !errors.Is(err, errDoorName) {
			t.Errorf("%s for %s: %v, want it given: %v", c.name, c.node.Short(), err, c.want)
		}
	}
	if _, err := newDoorNames(w.db, config.NameRules{{Glob: "x", Selector: "="}}, ""); err == nil {
		t.Error("a broken selector is taken")
	}
}

// At a proxy the side is that of the proxy, whatever the client's URL says.
func TestACMESide(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	d := &doorway{s: &Server{store: w.db}, log: testLog(t)}
	mine, other, gone := wire.NewID(), wire.NewID(), wire.NewID()
	err := w.db.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return errors.Join(tx.AddNode(ctx, &store.Node{ID: mine, Name: "mine", State: wire.StateRunning}), tx.AddNode(ctx, &store.Node{ID: other, Name: "other", State: wire.StateRunning}),
			tx.AddNode(ctx, &store.Node{ID: gone, Name: "gone", State: wire.StateRevoked}))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what  string
		party wire.Party // of the proxy
		name  string
		plain bool
		want  wire.ID
	}{
		{what: "a node's proxy", party: wire.Party{Role: wire.RoleNode, ID: mine}, name: "here", want: mine},
		{what: "another node at a proxy", party: wire.Party{Role: wire.RoleNode, ID: mine}, name: "other"},
		{what: "the same node by its name at its proxy", party: wire.Party{Role: wire.RoleNode, ID: mine}, name: "mine"},
		{what: "an RCP's proxy", party: wire.Party{Role: wire.RoleRCP, ID: wire.NewID()}, name: "here"},
		{what: "a revoked node's proxy", party: wire.Party{Role: wire.RoleNode, ID: gone}, name: "here"},
		{what: "the API, a name", name: "other", want: other},
		{what: "the API, a UUID", name: string(other), want: other},
		{what: "the API, here", name: "here"},
		{what: "the API, nobody", name: "nobody"},
		{what: "the API, a revoked node", name: "gone"},
		{what: "without https", name: "other", plain: true},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://doors.sallyport/acme/"+c.name+"/directory", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.party.ID != "" {
			req = req.WithContext(context.WithValue(req.Context(), doorPartyKey{}, c.party))
		}
		if !c.plain {
			req.TLS = &tls.ConnectionState{}
		}
		side, err := d.acmeSide(req, c.name)
		if side.ID != string(c.want) || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, errDoorSide) {
			t.Errorf("%s: %q %v, want %q", c.what, side.ID, err, c.want)
		}
	}
}

func TestDoorValuesSwap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	v := doorValues{w.db}
	ctx := t.Context()
	swap := func(old, value string, want bool, now string) {
		t.Helper()
		bytesOf := func(s string) []byte {
			if s == "" {
				return nil
			}
			return []byte(s)
		}
		got, swapped, err := v.Swap(ctx, "acme_orders", "x", bytesOf(old), bytesOf(value))
		if err != nil || swapped != want || string(got) != now {
			t.Errorf("swap %q for %q: %q %v %v, want %q %v", old, value, got, swapped, err, now, want)
		}
	}
	if _, err := v.Value(ctx, "acme_orders", "x"); !errors.Is(err, doors.ErrNoValue) {
		t.Errorf("before the first: %v", err)
	}
	swap("1", "2", false, "")
	swap("", "1", true, "1")
	swap("", "2", false, "1")
	swap("1", "2", true, "2")
	swap("2", "", true, "2")
	swap("", "3", true, "3")
	if all, err := v.Values(ctx, "acme_orders"); err != nil || len(all) != 1 || string(all["x"]) != "3" {
		t.Errorf("%v %v", all, err)
	}
	if _, _, err := v.Swap(ctx, "of nobody", "x", nil, []byte("1")); err == nil {
		t.Error("a bucket that nobody forgets is written to")
	}
	if _, _, err := v.Swap(ctx, "acme_orders", "y", nil, bytes.Repeat([]byte("x"), maxDoorValue+1)); err == nil {
		t.Error("a value without end is kept")
	}
}

// TestESTCodeNames: a code has the name as a request is read, and none is made for
// what is never certified.
func TestESTCodeNames(t *testing.T) {
	for _, c := range []struct{ in, name, fault string }{
		{"www.plant.example", "www.plant.example", ""},
		{"", "", ""},
		{"2001:DB8:0::1", "2001:db8::1", ""},
		{"::ffff:10.1.2.3", "10.1.2.3", ""},
		{"fe80::1%eth0", "", "want a host name in lower case, or an address"},
		{"WWW.plant.example", "", "want a host name in lower case, or an address"},
		{"x.td.sallyport", "", "name of the trust domain"},
		{"td.sallyport", "", "name of the trust domain"},
	} {
		j := &store.Join{Role: api.JoinEST, Name: c.in, MaxUses: 1}
		switch p := checkJoin(j, "td.sallyport"); {
		case c.fault == "" && (p != nil || j.Name != c.name):
			t.Errorf("%q: %q, %v", c.in, j.Name, p)
		case c.fault != "" && (p == nil || !strings.Contains(p.Error(), c.fault)):
			t.Errorf("%q: %v, want %q", c.in, p, c.fault)
		}
	}
	s := &Server{}
	s.cfg.DoorsName = "doors.sallyport"
	if _, err := s.createJoin(t.Context(), api.CreateJoin{Role: api.JoinEST, Name: s.cfg.DoorsName}); err == nil {
		t.Error("a code for the name of the doors themselves")
	}
}

func TestReadCSR(t *testing.T) {
	t.Parallel()
	der := testCSR(t)
	broken := bytes.Clone(der)
	broken[len(broken)-1] ^= 1
	for what, c := range map[string]struct {
		in string
		ok bool
	}{
		"DER": {string(der), true}, "base64": {base64.StdEncoding.EncodeToString(der), true}, "lines": {string(base64Lines(der)), true},
		"broken signature": {string(broken), false}, "nothing": {"", false}, "text": {"hello", false}, "too large": {strings.Repeat("A", maxDoorBody+1), false},
	} {
		if _, err := readCSR(strings.NewReader(c.in)); (err == nil) != c.ok {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func testCSR(t testing.TB) []byte {
	t.Helper()
	key := identitytest.NewKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"a.example"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// issuingDoors issue a leaf for a name.
type issuingDoors struct {
	doors.Authority

	t      *testing.T
	inter  *x509.Certificate
	key    *ecdsa.PrivateKey
	issued int64
	away   error
}

func newIssuingDoors(t *testing.T) *issuingDoors {
	key := identitytest.NewKey(t)
	a := &issuingDoors{t: t, key: key}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.inter = a.sign(tmpl, tmpl, &key.PublicKey)
	return a
}

func (a *issuingDoors) sign(tmpl, parent *x509.Certificate, pub any) *x509.Certificate {
	return identitytest.Sign(a.t, tmpl, parent, pub, a.key)
}

func (a *issuingDoors) Chain() []*x509.Certificate { return []*x509.Certificate{a.inter} }
func (a *issuingDoors) Doors() []*x509.Certificate { return a.Chain() }

func (a *issuingDoors) Issue(_ context.Context, in doors.Request) ([]*x509.Certificate, error) {
	csr, err := x509.ParseCertificateRequest(in.CSR)
	if err != nil {
		return nil, err
	}
	if a.away != nil {
		return nil, a.away
	}
	a.issued++
	return []*x509.Certificate{a.sign(&x509.Certificate{SerialNumber: big.NewInt(0x10000000 + a.issued), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), DNSNames: in.Names}, a.inter, csr.PublicKey)}, nil
}

// Doors whose own certificate was revoked show another one at once.
func TestDoorsOwnCertificateRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	s := &Server{store: w.db}
	s.cfg.DoorsName = "doors.sallyport"
	ca := newIssuingDoors(t)
	s.doors = &doorway{s: s, ca: ca, log: testLog(t)}
	roots := x509.NewCertPool()
	roots.AddCert(ca.inter)
	shown := func() string {
		t.Helper()
		here, there := net.Pipe()
		defer func() { _ = errors.Join(here.Close(), there.Close()) }()
		done := make(chan error, 1)
		go func() {
			done <- tls.Server(there, &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: s.doors.certificate, SessionTicketsDisabled: true}).HandshakeContext(t.Context())
		}()
		c := tls.Client(here, &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: s.cfg.DoorsName})
		if err := errors.Join(c.HandshakeContext(t.Context()), <-done); err != nil {
			t.Fatal(err)
		}
		return doors.Serial(c.ConnectionState().PeerCertificates[0].SerialNumber)
	}
	first := shown()
	if again := shown(); again != first {
		t.Fatalf("%s, then %s, for nothing", first, again)
	}
	if _, err := (&rest{s: s}).revokeCertificate(t.Context(), &bySerial{Serial: first}); err != nil {
		t.Fatal(err)
	}
	if next := shown(); next == first {
		t.Errorf("the certificate %s is revoked and still shown", first)
	}
}

// TestRevokeBySerial: a serial number is known as openssl prints it, with the
// zero that makes its digits even, and by the beginning of that.
func TestRevokeBySerial(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	issuer := wire.HashSPKI([]byte("issuer"))
	serials := []string{"cb04d62a9b17135321914a3948fd800", "cb04d62b9b17135321914a3948fd8001", "1b04d62a9b17135321914a3948fd8001"}
	w.update(func(ctx context.Context, tx *store.Tx) (err error) {
		for _, serial := range serials {
			err = errors.Join(err, tx.AddCertificate(ctx, &store.Certificate{Issuer: issuer, Serial: serial, KeyHash: issuer, Door: "est", Names: []string{"www.example"}, NotAfter: time.Now().Add(time.Hour)}))
		}
		return err
	})
	r := &rest{s: &Server{store: w.db, doors: &doorway{log: testLog(t)}}}
	for _, c := range []struct{ typed, revoked string }{
		{"0CB04D6", ""}, {"00000000", ""}, {"01B04D62", ""}, {"0CB04D62", serials[0]}, {"CB:04:D6:2B", serials[1]}, {"1B04D62A9B17135321914A3948FD8001", serials[2]},
	} {
		got, err := r.revokeCertificate(t.Context(), &bySerial{Serial: c.typed})
		switch {
		case c.revoked == "" && err == nil:
			t.Errorf("%s revoked %s", c.typed, got.Body.Serial)
		case c.revoked != "" && (err != nil || got.Body.Serial != c.revoked):
			t.Errorf("%s: %v, want %s revoked", c.typed, err, c.revoked)
		}
	}
}

// What the certificates of an EST answer are wrapped in holds just them.
func TestCertsOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	der, err := certsOnly([]*x509.Certificate{w.ca.Root, w.ca.Root})
	if err != nil {
		t.Fatal(err)
	}
	var outer struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue `asn1:"explicit,tag:0"`
	}
	if rest, err := asn1.Unmarshal(der, &outer); err != nil || len(rest) > 0 || !outer.Type.Equal(oidSignedData) {
		t.Fatalf("%v %v", outer.Type, err)
	}
	if n := bytes.Count(der, w.ca.Root.Raw); n != 2 {
		t.Errorf("%d certificates", n)
	}
}

// One source that asks without end does not keep the others out.
func TestDoorSources(t *testing.T) {
	t.Parallel()
	d := &doorway{sources: map[string]*doorSource{}}
	for range doorsAtOnce {
		if _, ok := d.enter("slow", doorRate, doorBurst); !ok {
			t.Fatal("refused within what it may have at once")
		}
	}
	if _, ok := d.enter("slow", doorRate, doorBurst); ok {
		t.Error("more at once than it may have")
	}
	for range doorBurst {
		s, ok := d.enter("a", doorRate, doorBurst)
		if !ok {
			t.Fatal("refused within the burst")
		}
		s.active.Add(-1)
	}
	if _, ok := d.enter("a", doorRate, doorBurst); ok {
		t.Error("more than the burst")
	}
	if _, ok := d.enter("b", doorRate, doorBurst); !ok {
		t.Error("another source is refused")
	}
	for i := range maxDoorSources + 10 {
		d.enter(strings.Repeat("x", 1+i%7)+time.Duration(i).String(), doorRate, doorBurst)
	}
	if len(d.sources) > maxDoorSources {
		t.Errorf("%d sources are remembered", len(d.sources))
	}
}

func FuzzOCSP(f *testing.F) {
	f.Add([]byte{0x30, 0x03, 0x0a, 0x01, 0x01})
	f.Fuzz(func(t *testing.T, b []byte) {
		d := &doorStatus{ca: noIssuers{}, now: time.Now}
		if out, _ := d.ocsp(t.Context(), b); len(out) == 0 {
			t.Error("no answer")
		}
	})
}

// noIssuers is an authority that issued nothing.
type noIssuers struct{ doors.Authority }

func (noIssuers) Issuers() []*x509.Certificate { return nil }

// TestDoorsLargeBodies: clients are told that it is their request that is too
// large, whether it says so beforehand or not.
func TestDoorsLargeBodies(t *testing.T) {
	t.Parallel()
	d := &doorway{mux: http.NewServeMux(), slots: make(chan struct{}, 1), sources: map[string]*doorSource{}}
	d.mux.HandleFunc("POST /acme/here/new-order", func(w http.ResponseWriter, req *http.Request) {
		n, err := io.Copy(w, req.Body)
		if err != nil || n != maxDoorBody {
			t.Errorf("%d bytes, %v", n, err)
		}
	})
	for size, want := range map[int]int{maxDoorBody: http.StatusOK, maxDoorBody + 1: http.StatusRequestEntityTooLarge} {
		for _, said := range []bool{true, false} {
			req := httptest.NewRequestWithContext(t.Context(), "POST", "https://doors.sallyport/acme/here/new-order", strings.NewReader(strings.Repeat("A", size)))
			if !said {
				req.ContentLength = -1
			}
			w := httptest.NewRecorder()
			if d.ServeHTTP(w, req); w.Code != want {
				t.Errorf("%d bytes, said %t: %d %s", size, said, w.Code, w.Body)
			}
		}
	}
}

// TestESTAnswers: clients come back by themselves to an authority that is away,
// and in vain with a key that others may have.
func TestESTAnswers(t *testing.T) {
	t.Parallel()
	k := newDesk(t)
	s := &Server{store: k.store, ca: bundleCA{k.rolls()}}
	names, err := newDoorNames(k.store, nil, "doors.sallyport")
	if err != nil {
		t.Fatal(err)
	}
	ca := newIssuingDoors(t)
	d := &doorway{s: s, ca: ca, log: testLog(t), names: names, stray: rate.NewLimiter(1, 10)}
	e := &doorEST{d}
	code, err := k.createJoin(t.Context(), api.CreateJoin{Role: api.JoinEST, Name: "a.example"})
	if err != nil {
		t.Fatal(err)
	}
	csr := testCSR(t)
	enroll := func() *httptest.ResponseRecorder {
		req := httptest.NewRequestWithContext(t.Context(), "POST", "https://doors.sallyport/.well-known/est/simpleenroll", bytes.NewReader(csr))
		req.SetBasicAuth("device", code.Code)
		w := httptest.NewRecorder()
		e.enroll(w, req, false)
		return w
	}
	ca.away = &url.Error{Op: "Post", URL: "https://pki/v1/doors/leaf", Err: io.EOF}
	if w := enroll(); w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("away: %d %v %s", w.Code, w.Header(), w.Body)
	}
	ca.away = nil
	if w := enroll(); w.Code != http.StatusOK { // the code is not used up
		t.Errorf("back: %d %s", w.Code, w.Body)
	}
	revoke := func(reason int) {
		t.Helper()
		if err := k.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
			return tx.RevokeCertificate(ctx, wire.KeyOf(ca.inter), doors.Serial(big.NewInt(0x10000000+ca.issued)), reason)
		}); err != nil {
			t.Fatal(err)
		}
	}
	revoke(api.RevocationReasons["superseded"])
	if w := enroll(); w.Code != http.StatusOK {
		t.Errorf("its key is as good as before: %d %s", w.Code, w.Body)
	}
	revoke(api.RevocationReasons["key-compromise"])
	if w := enroll(); w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), "key-compromise") {
		t.Errorf("the key of a thief: %d %s", w.Code, w.Body)
	}
	// Nor does another certificate of that key, from before, open the door.
	parsed, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	before := ca.sign(&x509.Certificate{SerialNumber: big.NewInt(0x20000000), NotAfter: time.Now().Add(time.Hour)}, ca.inter, parsed.PublicKey)
	if err := k.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.AddCertificate(ctx, &store.Certificate{Issuer: wire.KeyOf(ca.inter), Serial: doors.Serial(before.SerialNumber), Door: "est", Names: []string{"www.plant.example", "192.0.2.1"}, KeyHash: wire.KeyOf(before), NotAfter: before.NotAfter})
	}); err != nil {
		t.Fatal(err)
	}
	if err := e.stillGood(t.Context(), k.store.Queries, before); !errors.Is(err, errESTAuth) || !strings.Contains(err.Error(), "key-compromise") {
		t.Errorf("another certificate of that key: %v", err)
	}
	// Whoever revokes it, the audit log calls it as it did when it was issued.
	if err := e.d.acmeRevoke(t.Context(), before.SerialNumber, api.RevocationReasons["superseded"]); err != nil {
		t.Fatal(err)
	}
	if rows, err := k.store.AuditLog(t.Context(), store.AuditFilter{What: "certificate.revoke", Limit: 1}); err != nil || len(rows) != 1 || rows[0].Object != "www.plant.example 192.0.2.1" {
		t.Errorf("audit log %+v %v", rows, err)
	}
}

// Without TLS, a proxy could put another CA in the place of ours.
func TestPlainClientsAtProxies(t *testing.T) {
	t.Parallel()
	h := (&doorway{}).atProxies()
	for _, path := range []string{"/.well-known/est/cacerts", "/root/00", "/acme/here/directory", "/spiffe/bundle.json"} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "http://doors.sallyport"+path, nil))
		if w.Code != http.StatusForbidden {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}
