package gateway

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// delegate is an authority with an external CA that signs CRLs.
type delegate struct {
	state  wire.CAState
	told   []string
	answer wire.CAStatus
	err    error
}

func (c *delegate) State() wire.CAState { return c.state }

func (c *delegate) ExternalCRL(_ context.Context, _ wire.KeyHash, revoked []doors.Revoked) (wire.CAStatus, error) {
	c.told = nil
	for _, r := range revoked {
		c.told = append(c.told, doors.Serial(r.Serial))
	}
	return c.answer, c.err
}

// stuckWriter is a client that reads nothing until read is closed.
type stuckWriter struct {
	*httptest.ResponseRecorder

	writes, read chan struct{}
}

func (s stuckWriter) Write(b []byte) (int, error) {
	close(s.writes)
	<-s.read
	return s.ResponseRecorder.Write(b)
}

// Where an external CA issues it is told what is revoked, its CRL is handed on as
// long as it is good, and there is no OCSP.
func TestExternalCRLIsHandedOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	defer func() { _ = w.db.Close() }()
	issuer := wire.HashSPKI([]byte("inter"))
	w.update(func(ctx context.Context, tx *store.Tx) error {
		key := wire.HashSPKI([]byte("node"))
		party := wire.NewID()
		if err := tx.AddNode(ctx, &store.Node{ID: party, Name: "web", State: wire.StateRunning, KeyHash: key}); err != nil {
			return err
		}
		errs := []error{tx.PutKey(ctx, &store.Key{KeyHash: key, Role: wire.RoleNode, PartyID: party, Name: "web", IssuedAt: tx.Now(), NotAfter: tx.Now().Add(time.Hour)})}
		for serial, of := range map[string]wire.KeyHash{"abc1": key, "abc2": wire.HashSPKI([]byte("another"))} {
			errs = append(errs, tx.AddCertificate(ctx, &store.Certificate{Issuer: issuer, Serial: serial, KeyHash: of, NotAfter: tx.Now().Add(time.Hour)}))
		}
		_, err := tx.RevokeKeys(ctx, party, "by a test")
		return errors.Join(append(errs, err)...)
	})
	ca := &delegate{state: wire.CAState{External: "https://ca.example", Intermediates: []wire.CAIssuer{{N: 1, Key: issuer, State: wire.IssuerIssuing}, {N: 2, Key: wire.HashSPKI([]byte("old")), State: wire.IssuerRetired}}}}
	x := newExternalStatus(ca, w.db, testLog(t))
	get := func(name string) (int, string) {
		rec := httptest.NewRecorder()
		if !x.serveCRL(rec, name) {
			return http.StatusNotFound, ""
		}
		return rec.Code, rec.Body.String()
	}
	name := doors.KeyName(issuer) + ".crl"

	ca.answer = wire.CAStatus{Missing: 1, Problem: "it has no CRL"}
	x.turn(t.Context())
	if len(ca.told) != 1 || ca.told[0] != "abc1" {
		t.Errorf("it was told %v", ca.told)
	}
	if code, text := get(name); code != http.StatusServiceUnavailable || !strings.Contains(text, "ca show") {
		t.Errorf("without a CRL: %d %s", code, text)
	}
	v := x.view(ca.state.Intermediates)
	if len(v) != 1 || v[0].CRL != "none" || v[0].Missing != 1 || v[0].Problem == "" || !strings.HasPrefix(v[0].OCSP, "none") {
		t.Errorf("%+v", v)
	}
	ca.answer = wire.CAStatus{CRL: []byte("list"), Next: time.Now().Add(time.Hour)}
	x.turn(t.Context())
	if code, text := get(name); code != http.StatusOK || text != "list" {
		t.Errorf("with one: %d %q", code, text)
	}
	// A client that does not read it keeps nobody else waiting.
	slow := stuckWriter{httptest.NewRecorder(), make(chan struct{}), make(chan struct{})}
	served := make(chan struct{})
	go func() { defer close(served); x.serveCRL(slow, name) }()
	<-slow.writes
	free := x.mu.TryLock()
	if free {
		x.mu.Unlock()
	}
	close(slow.read)
	<-served
	if !free {
		t.Error("the lists are locked while a client is served")
	}
	// The one that is there is good until it ends, whatever becomes of the CA.
	ca.answer, ca.err = wire.CAStatus{}, errors.New("away")
	x.turn(t.Context())
	if code, _ := get(name); code != http.StatusOK {
		t.Errorf("while the CA is away: %d", code)
	}
	if v := x.view(ca.state.Intermediates); v[0].Problem != "away" || v[0].Next == nil || !strings.Contains(v[0].CRL, name) {
		t.Errorf("%+v", v)
	}
	if code, _ := get("0123456789abcdef.crl"); code != http.StatusNotFound {
		t.Errorf("of nobody: %d", code)
	}
	if newExternalStatus(testIssuer{t, w.ca}, w.db, testLog(t)).view(nil) != nil {
		t.Error("a CA of our own has the status of an external one")
	}
}
