package pki_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.step.sm/crypto/jose"

	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
)

// memory is doors.Values for a test.
type memory struct {
	mu sync.Mutex
	m  map[string][]byte
}

func (v *memory) Value(_ context.Context, bucket, name string) ([]byte, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if b, ok := v.m[bucket+"/"+name]; ok {
		return b, nil
	}
	return nil, doors.ErrNoValue
}

func (v *memory) Values(context.Context, string) (map[string][]byte, error) {
	return map[string][]byte{}, nil
}

func (v *memory) Swap(_ context.Context, bucket, name string, old, value []byte) ([]byte, bool, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := v.m[bucket+"/"+name]
	if !bytes.Equal(now, old) {
		return now, false, nil
	}
	if value == nil {
		delete(v.m, bucket+"/"+name)
	} else {
		v.m[bucket+"/"+name] = value
	}
	return value, true, nil
}

// acmeSite is an ACME door, and clients of its sides.
type acmeSite struct {
	t        *testing.T
	srv      *httptest.Server
	recorded []*x509.Certificate
	answer   func(path string) string // of every host, to http-01
	dialled  []string
	broken   atomic.Bool // nothing can be kept
	failed   atomic.Pointer[error]
}

// failing are values that cannot be written while broken is set.
type failing struct {
	*memory

	broken *atomic.Bool
}

func (f *failing) Swap(ctx context.Context, bucket, name string, old, now []byte) ([]byte, bool, error) {
	if f.broken.Load() {
		return nil, false, errors.New("the disk is full")
	}
	return f.memory.Swap(ctx, bucket, name, old, now)
}

// TestACMEFailure: why a client was answered with an error of ours is told, since
// the answer does not say it.
func TestACMEFailure(t *testing.T) {
	s := newACMESite(t)
	key, kid := s.account("one")
	if status, _, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers("www.two.example")); status/100 != 4 || s.failed.Load() != nil {
		t.Errorf("its own mistake: %d %s, %v", status, body, s.failed.Load())
	}
	s.broken.Store(true)
	status, _, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers("www.one.example"))
	if err := s.failed.Load(); status != http.StatusInternalServerError || err == nil || !strings.Contains((*err).Error(), "the disk is full") {
		t.Errorf("%d %s, %v", status, body, err)
	}
}

func newACMESite(t *testing.T) *acmeSite {
	a := open(t, t.TempDir())
	t.Cleanup(func() { closeIt(t, a) })
	d := openDoors(t, a, "")
	s := &acmeSite{t: t, answer: func(string) string { return "" }}
	host := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, s.answer(r.URL.Path)) }))
	t.Cleanup(host.Close)
	h, err := d.ACME(doors.ACME{
		Values: &failing{&memory{m: map[string][]byte{}}, &s.broken},
		Side: func(_ *http.Request, name string) (doors.Side, error) {
			if name != "one" && name != "two" {
				return doors.Side{}, errors.New("no such side")
			}
			return doors.Side{ID: "id-" + name, Name: name,
				Allow: func(_ context.Context, host string) error {
					if strings.HasSuffix(host, "."+name+".example") || strings.HasSuffix(host, a.TrustDomain()) || host == "192.0.2.1" {
						return nil
					}
					return fmt.Errorf("%s is not for side %s", host, name)
				},
				Dial: func(ctx context.Context, kind, dialled string) (net.Conn, error) {
					s.dialled = append(s.dialled, name+" "+kind+" "+dialled)
					return new(net.Dialer).DialContext(ctx, "tcp", host.Listener.Addr().String())
				}}, nil
		},
		Record: func(_ context.Context, _ doors.Side, leaf *x509.Certificate) error {
			s.recorded = append(s.recorded, leaf)
			return nil
		},
		Revoked: func(context.Context, *big.Int) (bool, error) { return false, nil },
		Revoke:  func(context.Context, *big.Int, int) error { return nil },
		Failed:  func(err error) { s.failed.Store(&err) },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.srv = httptest.NewTLSServer(h)
	t.Cleanup(s.srv.Close)
	return s
}

// post signs and sends one request. kid is empty for one with the key itself.
func (s *acmeSite) post(key *jose.JSONWebKey, kid, url string, payload any) (status int, location string, body []byte) {
	s.t.Helper()
	side := strings.Split(strings.TrimPrefix(url, s.srv.URL+"/acme/"), "/")[0]
	res, err := s.srv.Client().Head(s.srv.URL + "/acme/" + side + "/new-nonce")
	if err != nil {
		s.t.Fatal(err)
	}
	_ = res.Body.Close()
	return s.send(key, kid, url, payload, res.Header.Get("Replay-Nonce"))
}

func (s *acmeSite) send(key *jose.JSONWebKey, kid, url string, payload any, nonce string) (status int, location string, body []byte) {
	s.t.Helper()
	opts := new(jose.SignerOptions).WithHeader("url", url).WithHeader("nonce", nonce)
	if kid == "" {
		public := key.Public()
		opts.WithHeader("jwk", &public)
	} else {
		opts.WithHeader("kid", kid)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.SignatureAlgorithm(key.Algorithm), Key: key.Key}, opts)
	if err != nil {
		s.t.Fatal(err)
	}
	b := []byte{}
	if payload != nil {
		if b, err = json.Marshal(payload); err != nil {
			s.t.Fatal(err)
		}
	}
	signed, err := signer.Sign(b)
	if err != nil {
		s.t.Fatal(err)
	}
	res, err := s.srv.Client().Post(url, "application/jose+json", strings.NewReader(signed.FullSerialize()))
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	if body, err = io.ReadAll(res.Body); err != nil {
		s.t.Fatal(err)
	}
	return res.StatusCode, res.Header.Get("Location"), body
}

func (s *acmeSite) account(side string) (*jose.JSONWebKey, string) {
	s.t.Helper()
	key, err := jose.GenerateJWK("EC", "P-256", "ES256", "sig", "", 0)
	if err != nil {
		s.t.Fatal(err)
	}
	status, kid, body := s.post(key, "", s.srv.URL+"/acme/"+side+"/new-account", map[string]any{"termsOfServiceAgreed": true})
	if status != http.StatusCreated {
		s.t.Fatalf("new account: %d %s", status, body)
	}
	return key, kid
}

func identifiers(names ...string) map[string]any {
	var ids []map[string]string
	for _, n := range names {
		ids = append(ids, map[string]string{"type": "dns", "value": n})
	}
	return map[string]any{"identifiers": ids}
}

// An order gives what its side allows, and its challenges are looked at from
// there; another side cannot go on with it.
func TestACMESides(t *testing.T) {
	s := newACMESite(t)
	var links map[string]string
	resp, err := s.srv.Client().Get(s.srv.URL + "/acme/one/directory")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(json.NewDecoder(resp.Body).Decode(&links), resp.Body.Close()); err != nil || links["newOrder"] != s.srv.URL+"/acme/one/new-order" || links["revokeCert"] == "" || links["keyChange"] != "" {
		t.Errorf("the directory names %v, %v", links, err)
	}
	key, kid := s.account("one")
	for what, names := range map[string][]string{
		"another side's name": {"www.two.example"}, "one of both": {"www.one.example", "www.two.example"},
		"a wildcard": {"*.one.example"}, "no host": {"a_b.one.example"}, "a port": {"www.one.example:80"},
	} {
		if status, _, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers(names...)); status/100 != 4 {
			t.Errorf("%s: %d %s", what, status, body)
		}
	}
	if status, _, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers("192.0.2.1")); status/100 != 4 || !strings.Contains(string(body), "type ip") {
		t.Errorf("an address as a host name: %d %s", status, body)
	}
	status, order, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers("www.one.example"))
	var o struct {
		Status         string
		Authorizations []string
		Finalize       string
		Certificate    string
	}
	decode(t, body, &o)
	if status != http.StatusCreated || len(o.Authorizations) != 1 {
		t.Fatalf("new order: %d %s", status, body)
	}
	type authorization struct {
		Status     string
		Challenges []struct{ Type, URL, Token, Status string }
	}
	look := func(url string) (az authorization) {
		t.Helper()
		status, _, body := s.post(key, kid, url, nil)
		if status != http.StatusOK {
			t.Fatalf("authorization: %d %s", status, body)
		}
		decode(t, body, &az)
		return az
	}
	az := look(o.Authorizations[0])
	if len(az.Challenges) != 2 {
		t.Fatalf("%d challenges: %+v", len(az.Challenges), az)
	}
	challenge := az.Challenges[0]
	for _, c := range az.Challenges {
		if c.Type == doors.ChallengeHTTP {
			challenge = c
		}
		if c.Type != doors.ChallengeHTTP && c.Type != doors.ChallengeTLS {
			t.Errorf("challenge %s is offered", c.Type)
		}
	}

	// From another side nothing of it can be had.
	for _, url := range []string{order, o.Authorizations[0], challenge.URL, o.Finalize} {
		if status, _, body := s.post(key, kid, strings.Replace(url, "/acme/one/", "/acme/two/", 1), map[string]any{}); status/100 == 2 {
			t.Errorf("%s from side two: %d %s", url, status, body)
		}
	}
	// Nor with another account.
	otherKey, otherKid := s.account("one")
	if status, _, _ := s.post(otherKey, otherKid, challenge.URL, map[string]any{}); status/100 == 2 {
		t.Error("another account answers the challenge")
	}
	// A nonce is good once.
	res, err := s.srv.Client().Head(s.srv.URL + "/acme/one/new-nonce")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	nonce := res.Header.Get("Replay-Nonce")
	if status, _, body := s.send(key, kid, order, nil, nonce); status != http.StatusOK {
		t.Fatalf("order: %d %s", status, body)
	}
	if status, _, body := s.send(key, kid, order, nil, nonce); status != http.StatusBadRequest || !strings.Contains(string(body), "badNonce") {
		t.Errorf("the same nonce again: %d %s", status, body)
	}

	public := key.Public()
	thumb, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	s.answer = func(path string) string {
		return strings.TrimPrefix(path, "/.well-known/acme-challenge/") + "." + base64.RawURLEncoding.EncodeToString(thumb) + "\n"
	}
	if status, _, body := s.post(key, kid, challenge.URL, map[string]any{}); status != http.StatusOK || !strings.Contains(string(body), `"valid"`) {
		t.Fatalf("challenge: %d %s", status, body)
	}
	if len(s.dialled) != 1 || s.dialled[0] != "one http-01 www.one.example" {
		t.Errorf("dialled: %v", s.dialled)
	}
	finalize := func(names ...string) (int, []byte) {
		t.Helper()
		status, _, body := s.post(key, kid, o.Finalize, map[string]string{"csr": base64.RawURLEncoding.EncodeToString(doorCSR(t, identitytest.NewKey(t), names...))})
		return status, body
	}
	if status, body := finalize("www.one.example", "ftp.one.example"); status/100 == 2 {
		t.Errorf("a CSR with one more name: %s", body)
	}
	if status, body := finalize("www.one.example"); status != http.StatusOK {
		t.Fatalf("finalize: %d %s", status, body)
	}
	if len(s.recorded) != 1 || s.recorded[0].DNSNames[0] != "www.one.example" || len(s.recorded[0].URIs) != 0 {
		t.Errorf("recorded: %v", s.recorded)
	}
}

// A challenge that fails ends its order at once, so that no client waits for a
// better answer.
func TestACMEFailedChallenge(t *testing.T) {
	s := newACMESite(t)
	key, kid := s.account("one")
	s.answer = func(string) string { return strings.Repeat("x", 1<<20) } // and an endless answer is not read
	_, order, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers("www.one.example"))
	var o struct{ Authorizations []string }
	decode(t, body, &o)
	_, _, body = s.post(key, kid, o.Authorizations[0], nil)
	var az struct{ Challenges []struct{ Type, URL string } }
	decode(t, body, &az)
	for _, c := range az.Challenges {
		if c.Type == doors.ChallengeHTTP {
			s.post(key, kid, c.URL, map[string]any{})
		}
	}
	for _, url := range []string{o.Authorizations[0], order} {
		if _, _, body := s.post(key, kid, url, nil); !strings.Contains(string(body), `"invalid"`) {
			t.Errorf("%s: %s", url, body)
		}
	}
	if len(s.recorded) != 0 {
		t.Error("a certificate all the same")
	}
	// One side that asks without end is slowed down, and the other is not.
	limited := false
	for i := range 300 {
		status, _, body := s.post(key, kid, s.srv.URL+"/acme/one/new-order", identifiers(fmt.Sprintf("h%d.one.example", i)))
		if status == http.StatusTooManyRequests || strings.Contains(string(body), "rateLimited") {
			limited = true
			break
		}
	}
	if !limited {
		t.Error("300 orders at once are taken")
	}
	key, kid = s.account("two")
	if status, _, body := s.post(key, kid, s.srv.URL+"/acme/two/new-order", identifiers("www.two.example")); status != http.StatusCreated {
		t.Errorf("the other side: %d %s", status, body)
	}
}

func decode(t *testing.T, b []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
}
