package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// reborn answers the change of identity as a node does: it keeps the code and
// comes back as another party.
func (d *desk) reborn(a *applicant, boot string) {
	d.answer = func(_ wire.Party, _, path string, in, _ any) error {
		if path != wire.PathReidentify {
			return nil
		}
		env := in.(wire.Envelope)
		var q wire.Reidentify
		if err := json.Unmarshal(env.Payload, &q); err != nil {
			return err
		}
		if q.Node != a.id.ID() || q.Boot != "" && q.Boot != boot {
			return &statusError{Status: http.StatusForbidden, Reason: "not me"}
		}
		if err := os.WriteFile(a.file, []byte(q.Join), 0o600); err != nil {
			return err
		}
		if err := a.id.Reidentify(); err != nil {
			return err
		}
		go d.comeBack(a) // it reads the code, and waits at an RCP again
		return errors.New("the session ended with the old identity")
	}
}

func (d *desk) comeBack(a *applicant) {
	for ctx := d.t.Context(); ctx.Err() == nil; {
		if _, certified := a.id.Party(); certified || a.Wait(ctx) != nil {
			return
		}
		d.mu.Lock()
		d.parties[a.id.KeyHash()] = a
		d.mu.Unlock()
		d.see(a)
	}
}

func TestReidentifyKeepsNameTagsAndHistory(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web", Tags: map[string]string{"role": "web"}}), "")
	oldID, oldKey := a.id.ID(), a.id.KeyHash()
	err := d.store.Update(t.Context(), func(ctx context.Context, tx *store.Tx) error {
		return tx.TagNode(ctx, oldID, map[string]string{"tier": "gold"}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	old, err := d.store.Node(t.Context(), oldID)
	if err != nil {
		t.Fatal(err)
	}
	d.reborn(a, "")
	n, err := d.reidentify(t.Context(), old, api.Reidentify{})
	if err != nil {
		t.Fatal(err)
	}
	if n.ID == oldID || n.ID != a.id.ID() || n.Name != "web" || n.KeyHash == oldKey {
		t.Errorf("node %+v", n)
	}
	tags, err := d.store.NodeTags(t.Context(), n.ID)
	if eff := store.Effective(tags); err != nil || eff["tier"] != "gold" || eff["role"] != "web" {
		t.Errorf("tags %v %v", eff, err)
	}
	// The node is told of its grant while the new set of revocations is made.
	eventually(t, "the old key is revoked", func() bool { return d.id.Revoked(oldKey) })
	if d.id.Revoked(a.id.KeyHash()) {
		t.Error("the new key is revoked")
	}
	if d.audited("node.reidentify") != 1 {
		t.Error("no audit row")
	}
}

func TestReidentifyBesideTheOldNode(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web", AllowTags: []string{"env=*"}}), "")
	d.enrolled(d.join(api.CreateJoin{Name: "db"}), "")
	oldID, oldKey := a.id.ID(), a.id.KeyHash()
	old, err := d.store.Node(t.Context(), oldID)
	if err != nil {
		t.Fatal(err)
	}
	d.reborn(a, "boot-2")
	if _, err := d.reidentify(t.Context(), old, api.Reidentify{Name: "db"}); !api.Is(err, api.CodeNameInUse) {
		t.Errorf("a name that is taken: %v", err)
	}
	if _, err := d.reidentify(t.Context(), old, api.Reidentify{Name: "web-2", Boot: "boot-1"}); err == nil {
		t.Error("another machine than the one meant took the identity")
	}
	joins, err := d.store.Joins(t.Context())
	if err != nil || joins[0].Name != "web-2" || joins[0].RevokedAt.IsZero() {
		t.Errorf("the code that nobody took is good: %+v %v", joins[0], err)
	}
	n, err := d.reidentify(t.Context(), old, api.Reidentify{Name: "web-2", Boot: "boot-2"})
	if err != nil {
		t.Fatal(err)
	}
	if n.Name != "web-2" || n.ID == oldID || len(n.AllowTags) != 1 {
		t.Errorf("node %+v", n)
	}
	if _, err := d.store.Node(t.Context(), oldID); err != nil || d.id.Revoked(oldKey) {
		t.Errorf("the old node is not what it was: %v, revoked %t", err, d.id.Revoked(oldKey))
	}
}

// TestReidentifyOfANodeThatHasGone: the session is dead and nobody has noticed
// yet. The node was told nothing, so the code ends at once.
func TestReidentifyOfANodeThatHasGone(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	n, err := d.store.Node(t.Context(), a.id.ID())
	if err != nil {
		t.Fatal(err)
	}
	d.answer = func(_ wire.Party, _, path string, _, _ any) error {
		if path == wire.PathReidentify {
			t.Error("the code was sent into a session that nobody answers in")
		}
		return errMute
	}
	ctx, cancel := context.WithTimeout(t.Context(), reidentifyWait/2)
	defer cancel()
	if _, err := d.reidentify(ctx, n, api.Reidentify{}); !errors.Is(err, ErrNotConnected) || ctx.Err() != nil {
		t.Errorf("%v, want that it is not connected", err)
	}
	if joins, err := d.store.Joins(t.Context()); err != nil || joins[0].RevokedAt.IsZero() {
		t.Errorf("the code that nobody took is good: %+v %v", joins[0], err)
	}
}

func TestRekeyRevokesTheOldKey(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	a := d.enrolled(d.join(api.CreateJoin{Name: "web"}), "")
	old := a.id.KeyHash()
	stubborn := true
	d.answer = func(_ wire.Party, _, path string, in, out any) error {
		switch path {
		case wire.PathCSR:
			der, err := a.id.CSR(in.(wire.CSRRequest).Rekey && !stubborn)
			out.(*wire.CSR).DER = der
			return err
		case wire.PathCertificate:
			return a.id.Install(in.(wire.Certificate).Chain)
		}
		return nil
	}
	if err := d.renewNow(t.Context(), a.id.ID(), true); !errors.Is(err, errKey) {
		t.Errorf("the old key again: %v", err)
	}
	stubborn = false
	for range maxKeys + 2 { // each makes room for the next
		if err := d.renewNow(t.Context(), a.id.ID(), true); err != nil {
			t.Fatal(err)
		}
	}
	if a.id.KeyHash() == old || !d.id.Revoked(old) || d.id.Revoked(a.id.KeyHash()) {
		t.Errorf("old key revoked: %t, new one: %t", d.id.Revoked(old), d.id.Revoked(a.id.KeyHash()))
	}
	if n, err := d.store.Node(t.Context(), a.id.ID()); err != nil || n.KeyHash != a.id.KeyHash() {
		t.Errorf("node %+v %v", n, err)
	}
	if d.ca.env == nil {
		t.Error("no revocation set was signed")
	}
}

// A party whose leaf has ended gets a new one within the grace, with its key
// and without a code; after the grace it waits for an operator.
func TestRenewalAfterExpiryHasAGrace(t *testing.T) {
	for _, tc := range []struct {
		name    string
		grace   time.Duration
		away    time.Duration // after the end of its leaf
		granted bool
	}{
		{"within", 30 * 24 * time.Hour, 29 * 24 * time.Hour, true},
		{"after", 30 * 24 * time.Hour, 31 * 24 * time.Hour, false},
		{"none", 0, time.Hour, false},
		{"the default", 365 * 24 * time.Hour, 364 * 24 * time.Hour, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDesk(t)
				d.grace = tc.grace
				a, told := d.asking("web", "", nil)
				d.see(a)
				if _, err := d.grant(t.Context(), "web", api.Grant{}); err != nil {
					t.Fatal(err)
				}
				d.see(a)
				time.Sleep(time.Until(leafOf(t, told).NotAfter) + tc.away)
				*told = wire.EnrollVerdict{}
				d.see(a)
				if tc.granted {
					if told.State != wire.EnrollGranted || len(d.requests(api.RequestPending)) != 0 || time.Now().After(leafOf(t, told).NotAfter) {
						t.Errorf("the renewal made a request, or no leaf that is good: %+v", told)
					}
					return
				}
				if told.State != wire.EnrollPending || !strings.Contains(told.Reason, "SALLYPORT_GATEWAY_RENEWAL_GRACE") {
					t.Errorf("told %+v", told)
				}
				q := d.requests(api.RequestPending)
				if len(q) != 1 {
					t.Fatalf("%d requests wait, want 1", len(q))
				}
				if _, err := d.grant(t.Context(), q[0].ID, api.Grant{}); err != nil {
					t.Fatal(err)
				}
				d.see(a)
				if told.State != wire.EnrollGranted || time.Now().After(leafOf(t, told).NotAfter) {
					t.Errorf("granted by an operator: told %+v", told)
				}
			})
		})
	}
}

func leafOf(t *testing.T, v *wire.EnrollVerdict) *x509.Certificate {
	t.Helper()
	if len(v.Chain) == 0 {
		t.Fatalf("no certificate: %+v", v)
	}
	leaf, err := x509.ParseCertificate(v.Chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// A certificate is public: whoever shows an expired one without its key gets
// nothing, and the owner loses nothing.
func TestStolenExpiredCertificateIsNoRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		victim, granted := d.asking("web", "", nil)
		d.see(victim)
		if _, err := d.grant(t.Context(), "web", api.Grant{}); err != nil {
			t.Fatal(err)
		}
		d.see(victim)
		stolen := granted.Chain
		time.Sleep(time.Until(leafOf(t, granted).NotAfter) + time.Hour)
		thief, err := identity.Open(t.TempDir(), wire.RoleNode)
		if err != nil {
			t.Fatal(err)
		}
		csr := func(id *identity.Identity) []byte {
			der, err := id.CSR(false)
			if err != nil {
				t.Fatal(err)
			}
			return der
		}
		stolenCSR := csr(victim.id) // seen on its way
		issued := len(d.ca.issued)
		for name, der := range map[string][]byte{"own key": csr(thief), "the victim's request": stolenCSR} {
			var told wire.EnrollVerdict
			a := &applicant{id: thief, bend: func(r *http.Request, w *httptest.ResponseRecorder) bool {
				if r.Method == http.MethodPut {
					_ = json.NewDecoder(r.Body).Decode(&told)
					return true
				}
				_ = json.NewEncoder(w).Encode(wire.EnrollRequest{Role: wire.RoleNode, ID: victim.id.ID(), Name: "web", CSR: der, Expired: stolen, Versions: wire.OwnVersions})
				return true
			}}
			d.parties[thief.KeyHash()] = a
			d.see(a)
			if told.State == wire.EnrollGranted || len(told.Chain) > 0 {
				t.Errorf("%s: granted", name)
			}
		}
		if len(d.ca.issued) != issued {
			t.Error("a certificate was issued")
		}
		// On the wire the certificate alone opens nothing either: TLS wants a
		// signature of its key.
		own, err := thief.SelfSigned()
		if err != nil {
			t.Fatal(err)
		}
		if err := shows(t, own, own); err != nil {
			t.Fatalf("the handshake is good for nothing: %v", err)
		}
		if err := shows(t, own, &tls.Certificate{Certificate: stolen, PrivateKey: own.PrivateKey}); err == nil {
			t.Error("a handshake with another's certificate succeeded")
		}
		*granted = wire.EnrollVerdict{}
		d.see(victim)
		if granted.State != wire.EnrollGranted {
			t.Errorf("the owner is told %+v", granted)
		}
	})
}

// shows does a TLS handshake whose client shows a certificate, and returns what
// the server says of it.
func shows(t *testing.T, server, client *tls.Certificate) error {
	t.Helper()
	there, here := net.Pipe()
	defer func() { _, _ = there.Close(), here.Close() }()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c := tls.Client(there, &tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return client, nil }})
		if c.Handshake() == nil {
			_, _ = c.Read(make([]byte, 1)) // until the server is done
		}
	}()
	s := tls.Server(here, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*server}, ClientAuth: tls.RequireAnyClientCert})
	err := s.Handshake()
	_ = here.Close()
	<-done
	return err
}
