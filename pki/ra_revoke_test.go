package pki_test

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/jose"

	"sallyport/internal/doors"
	"sallyport/internal/identity/identitytest"
	"sallyport/internal/wire"
	"sallyport/pki"
)

// revoke is step-ca's: passive, by a token whose subject is the serial number.
func (s *stranger) revoke(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, why string) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]string{"message": why})
	}
	var in struct {
		Serial, OTT string
		Passive     bool
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		refuse(http.StatusBadRequest, err.Error())
		return
	}
	var claims jose.Claims
	token, err := jose.ParseSigned(in.OTT)
	if err == nil {
		err = token.Claims(&s.key.PublicKey, &claims)
	}
	if err == nil {
		err = claims.ValidateWithLeeway(jose.Expected{Issuer: "sallyport", Subject: in.Serial, Audience: jose.Audience{s.url + "/1.0/revoke"}, Time: time.Now()}, time.Minute)
	}
	n, ok := new(big.Int).SetString(in.Serial, 10)
	switch {
	case err != nil || !ok || !in.Passive:
		refuse(http.StatusUnauthorized, "no")
		return
	case s.noDB:
		refuse(http.StatusNotImplemented, "no persistence layer configured")
		return
	case slices.ContainsFunc(s.gone, func(g *big.Int) bool { return g.Cmp(n) == 0 }):
		refuse(http.StatusBadRequest, "already revoked")
		return
	}
	s.gone = append(s.gone, n)
	if s.crl != nil {
		s.makeCRL(s.inter, s.interKey, time.Hour)
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"status": "ok"})
}

func (s *stranger) serveCRL(w http.ResponseWriter, _ *http.Request) {
	if s.crl == nil {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	_, _ = w.Write(s.crl)
}

func (s *stranger) makeCRL(inter *x509.Certificate, key *ecdsa.PrivateKey, life time.Duration) {
	s.number++
	tmpl := &x509.RevocationList{Number: big.NewInt(s.number), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: time.Now().Add(life)}
	for _, n := range s.gone {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, inter, key)
	if err != nil {
		panic(err) // not in the test's goroutine
	}
	s.crl = der
}

// What is revoked here is revoked at the external CA, and its CRL is handed on
// when it is its own.
func TestExternalCRL(t *testing.T) {
	s := newStranger(t)
	a := open(t, t.TempDir(), s.option())
	defer closeIt(t, a)
	issuer := wire.KeyOf(s.inter)
	one, two := doors.Revoked{Serial: big.NewInt(0x1234), Reason: 4}, doors.Revoked{Serial: big.NewInt(0x5678)}
	ask := func(list ...doors.Revoked) wire.CAStatus {
		t.Helper()
		st, err := a.ExternalCRL(t.Context(), issuer, list)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	// Without a CRL it is told all the same.
	if st := ask(one); st.CRL != nil || st.Missing != 1 || !strings.Contains(st.Problem, "ca.json") || len(s.gone) != 1 {
		t.Errorf("without a CRL: %+v, told %v", st, s.gone)
	}
	s.makeCRL(s.inter, s.interKey, time.Hour)
	st := ask(one, two)
	if st.Problem != "" || st.Missing != 0 || len(s.gone) != 2 {
		t.Fatalf("%+v, told %v", st, s.gone)
	}
	list, err := x509.ParseRevocationList(st.CRL)
	if err != nil || list.CheckSignatureFrom(s.inter) != nil || len(list.RevokedCertificateEntries) != 2 || !st.Next.Equal(list.NextUpdate) {
		t.Errorf("%v, %v", list, err)
	}
	// It forgets what it was told: somebody restored it, and it is told again by
	// a new start of ours.
	newest := s.crl
	s.number, s.gone = 0, nil
	s.makeCRL(s.inter, s.interKey, time.Hour)
	if st := ask(one); st.CRL != nil || !strings.Contains(st.Problem, "restored") {
		t.Errorf("an older one: %+v", st)
	}
	s.crl, s.number = newest, 100
	for what, spoil := range map[string]func(){
		"one of another intermediate": func() {
			key := identitytest.NewKey(t)
			s.makeCRL(s.intermediate(s.root, s.rootKey, key), key, time.Hour)
		},
		"one that ended": func() { s.makeCRL(s.inter, s.interKey, -time.Hour) },
		"nonsense":       func() { s.crl = []byte("x") },
	} {
		spoil()
		if st := ask(one, two); st.CRL != nil || st.Problem == "" || st.Missing != 2 {
			t.Errorf("%s: %+v", what, st)
		}
	}
	s.noDB = true
	if st := ask(doors.Revoked{Serial: big.NewInt(9)}); !strings.Contains(st.Problem, "no database") {
		t.Errorf("without a database: %+v", st)
	}
	if _, err := a.ExternalCRL(t.Context(), strangerKey, nil); !errors.Is(err, pki.ErrRefused) {
		t.Errorf("an issuer that is none: %v", err)
	}
	own := open(t, t.TempDir())
	defer closeIt(t, own)
	if _, err := own.ExternalCRL(t.Context(), issuer, nil); !errors.Is(err, pki.ErrRefused) {
		t.Errorf("an authority of its own: %v", err)
	}
}
