package gateway

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// errESTAuth says that a client did not prove who it is.
var errESTAuth = errors.New("not authenticated")

// doorEST is Enrollment over Secure Transport (RFC 7030).
type doorEST struct{ d *doorway }

func (e *doorEST) routes() {
	const base = "/.well-known/est/"
	e.d.mux.HandleFunc("GET "+base+"cacerts", e.caCerts)
	e.d.mux.HandleFunc("GET "+base+"csrattrs", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }) // 4.5.2: none are asked for
	e.d.mux.HandleFunc("POST "+base+"simpleenroll", func(w http.ResponseWriter, req *http.Request) { e.enroll(w, req, false) })
	e.d.mux.HandleFunc("POST "+base+"simplereenroll", func(w http.ResponseWriter, req *http.Request) { e.enroll(w, req, true) })
}

// caCerts hands out what clients have to trust (4.1).
func (e *doorEST) caCerts(w http.ResponseWriter, _ *http.Request) {
	inters, roots := e.d.ca.Trust()
	e.answer(w, "application/pkcs7-mime", append(slices.Clone(inters), roots...))
}

func (e *doorEST) answer(w http.ResponseWriter, mime string, certs []*x509.Certificate) {
	der, err := certsOnly(certs)
	if err != nil {
		e.d.log.Error("EST answer not made", "error", err)
		http.Error(w, "internal error", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", mime)
	w.Header().Set("Content-Transfer-Encoding", "base64")
	_, _ = w.Write(base64Lines(der)) // the client is gone, or not
}

// enroll certifies a CSR (4.2). A client proves who it is by a code of
// `join create --est`, as the password of HTTP basic authentication, or by a
// certificate that it had from a door. With that it gets the same names again,
// and no others.
func (e *doorEST) enroll(w http.ResponseWriter, req *http.Request, again bool) {
	leaf, err := e.issue(req, again)
	switch {
	case err == nil:
		e.answer(w, "application/pkcs7-mime; smime-type=certs-only", []*x509.Certificate{leaf})
		return
	case errors.Is(err, errESTAuth):
		if !again {
			w.Header().Set("WWW-Authenticate", `Basic realm="sallyport est"`)
		}
		http.Error(w, err.Error(), http.StatusUnauthorized)
	case errors.Is(err, errDoorName):
		http.Error(w, err.Error(), http.StatusForbidden)
	case errors.Is(err, doors.ErrRefused):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case away(err) || errors.Is(err, store.ErrFull): // which passes: clients come back by themselves
		e.d.log.Error("EST enrolment failed", "error", err)
		w.Header().Set("Retry-After", doorRetry)
		http.Error(w, "the gateway cannot do it now", http.StatusServiceUnavailable)
		return
	default:
		e.d.log.Error("EST enrolment failed", "error", err)
		http.Error(w, "the gateway cannot do it now", http.StatusInternalServerError)
		return
	}
	e.d.refused(req, "est", err)
}

func (e *doorEST) issue(req *http.Request, again bool) (*x509.Certificate, error) {
	// Who it is comes before what it wants: strangers are told nothing else.
	join, old, err := e.client(req, again)
	if err != nil {
		return nil, err
	}
	csr, err := readCSR(req.Body)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	names, addrs, err := doors.NamesOf(csr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", doors.ErrRefused, err)
	}
	if old != nil {
		err = sameNames(old, names, addrs)
	} else {
		err = e.allow(req.Context(), join, names, addrs)
	}
	if err != nil {
		return nil, err
	}
	key := wire.HashSPKI(csr.RawSubjectPublicKeyInfo)
	if join != nil && join.Used >= join.MaxUses {
		if mine, err := e.d.s.store.JoinUsed(req.Context(), join.ID, key); err != nil || !mine {
			return nil, errors.Join(err, fmt.Errorf("%w: the code is used up", errESTAuth))
		}
	}
	chain, err := e.d.ca.Issue(req.Context(), doors.Request{CSR: csr.Raw, Names: names, Addresses: addrs})
	if err != nil {
		return nil, err
	}
	actor := "est client with the certificate " // and its serial number
	if join != nil {
		actor = "est code " + join.ID
	} else {
		actor += doors.Serial(old.SerialNumber)
	}
	ctx := store.WithActor(context.WithoutCancel(req.Context()), store.Actor{Who: actor, Origin: sourceName(req)})
	via, _ := doorPartyFrom(req.Context())
	err = e.d.record(ctx, "est", chain[0], string(via.ID), func(ctx context.Context, tx *store.Tx) error {
		if join == nil { // it may have been revoked this moment
			return e.stillGood(ctx, tx.Queries, old)
		}
		j, err := tx.Join(ctx, join.ID)
		if err != nil {
			return err
		}
		if err := e.codeGood(j); err != nil {
			return err
		}
		return tx.UseJoin(ctx, j.ID, key, "")
	})
	if errors.Is(err, store.ErrExists) {
		err = fmt.Errorf("%w: the code is used up", errESTAuth)
	}
	if err != nil {
		return nil, err
	}
	return chain[0], nil
}

// estName is the name of a code as [doors.NamesOf] reads it in a request: an
// address can be written in several ways.
func estName(name string) (string, bool) {
	if addr, err := netip.ParseAddr(name); err == nil {
		return addr.Unmap().String(), addr.Zone() == ""
	}
	return name, doors.ValidHost(name)
}

// checkESTCode finds every fault of a code for this door: what is never
// certified is refused here already, not at the device.
func checkESTCode(j *store.Join, trustDomain string) *api.Problem {
	var faults []api.ProblemError
	if j.Name != "" {
		name, ok := estName(j.Name)
		switch {
		case !ok:
			faults = append(faults, api.ProblemError{Location: "name", Message: fmt.Sprintf("%q: want a host name in lower case, or an address", wire.Quotable(j.Name))})
		case name == trustDomain || strings.HasSuffix(name, "."+trustDomain):
			faults = append(faults, api.ProblemError{Location: "name", Message: fmt.Sprintf("%q is a name of the trust domain, which no door certifies", name)})
		}
		j.Name = name
	}
	if j.MaxUses < 1 || j.MaxUses > maxJoinUses {
		faults = append(faults, api.ProblemError{Location: "uses", Message: fmt.Sprintf("%d: want 1 to %d", j.MaxUses, maxJoinUses)})
	}
	if len(j.Tags)+len(j.AllowTags)+len(j.RCPs) > 0 || j.Manual || j.Replaces {
		faults = append(faults, api.ProblemError{Location: "role", Message: "a code for EST has no tags, RCPs, manual or replace"})
	}
	if len(faults) == 0 {
		return nil
	}
	return api.NewProblem(api.CodeInvalid, "the code cannot be made", faults...)
}

// client finds out who asks: the code that it shows, or its certificate.
func (e *doorEST) client(req *http.Request, again bool) (*store.Join, *x509.Certificate, error) {
	if req.TLS == nil {
		return nil, nil, fmt.Errorf("%w: EST needs https", errESTAuth)
	}
	if _, password, ok := req.BasicAuth(); ok && !again {
		j, err := e.code(req.Context(), password)
		return j, nil, err
	}
	if len(req.TLS.PeerCertificates) == 0 {
		if again {
			return nil, nil, fmt.Errorf("%w: simplereenroll needs the certificate that is to be renewed as the client's certificate", errESTAuth)
		}
		return nil, nil, fmt.Errorf("%w: show a code of `sallyport join create --est` as the password, or a certificate of this CA", errESTAuth)
	}
	leaf := req.TLS.PeerCertificates[0]
	if err := e.verify(leaf); err != nil {
		return nil, nil, err
	}
	return nil, leaf, e.stillGood(req.Context(), e.d.s.store.Queries, leaf)
}

// verify takes a leaf of the doors' own intermediate and no other: that of a
// node, whose key has another purpose, certifies no host.
func (e *doorEST) verify(leaf *x509.Certificate) error {
	inters, roots := e.d.ca.Trust()
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, c := range roots {
		opts.Roots.AddCert(c)
	}
	for _, c := range inters {
		opts.Intermediates.AddCert(c)
	}
	_, err := leaf.Verify(opts)
	if err == nil && e.d.issuerOf(leaf) == nil {
		err = errors.New("it was not issued by the doors")
	}
	if err != nil {
		return fmt.Errorf("%w: the client's certificate: %w", errESTAuth, err)
	}
	return nil
}

// stillGood refuses a certificate that is revoked, or that nobody here issued.
func (e *doorEST) stillGood(ctx context.Context, q store.Queries, leaf *x509.Certificate) error {
	issuer := e.d.issuerOf(leaf)
	if issuer == nil {
		return fmt.Errorf("%w: the client's certificate is not of an issuer in use", errESTAuth)
	}
	row, err := q.Certificate(ctx, wire.KeyOf(issuer), doors.Serial(leaf.SerialNumber))
	switch {
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: the client's certificate is not known here", errESTAuth)
	case err != nil:
		return err
	case !row.RevokedAt.IsZero():
		return fmt.Errorf("%w: the client's certificate is revoked", errESTAuth)
	}
	bad, err := q.Compromised(ctx, row.KeyHash)
	if err == nil && bad {
		err = fmt.Errorf("%w: another certificate of the client's key was revoked as key-compromise", errESTAuth)
	}
	return err
}

// code finds the record of a code, ID.TOKEN.
func (e *doorEST) code(ctx context.Context, text string) (*store.Join, error) {
	id, token, ok := strings.Cut(strings.TrimSpace(text), ".")
	if !ok {
		return nil, fmt.Errorf("%w: the password is no code of `sallyport join create --est`", errESTAuth)
	}
	j, err := e.d.s.store.Join(ctx, id)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, err
	}
	if err != nil || !tokenFits(j, token) {
		return nil, fmt.Errorf("%w: the code is not known here", errESTAuth)
	}
	return j, e.codeGood(j)
}

// codeGood refuses a code that is over, or not for this door.
func (e *doorEST) codeGood(j *store.Join) error {
	switch {
	case j.Role != api.JoinEST || j.Manual || j.TrustDomain != e.d.s.ca.TrustDomain():
		return fmt.Errorf("%w: the code is not for this door", errESTAuth)
	case !j.RevokedAt.IsZero() || j.Generation != e.d.s.store.Installation().Generation:
		return fmt.Errorf("%w: the code was revoked", errESTAuth)
	case time.Now().After(j.ExpiresAt):
		return fmt.Errorf("%w: the code expired on %s", errESTAuth, j.ExpiresAt.UTC().Format(time.RFC3339))
	}
	return nil
}

// allow holds names against the one that the code is for, or, if it is for no
// certain one, against the rules that ask for no node.
func (e *doorEST) allow(ctx context.Context, j *store.Join, names []string, addrs []netip.Addr) error {
	all := slices.Clone(names)
	for _, a := range addrs {
		all = append(all, a.String())
	}
	for _, name := range all {
		if err := e.d.names.free(name); err != nil {
			return err
		}
		if j.Name != "" {
			if name != j.Name {
				return fmt.Errorf("%w: the code is for %s, not for %s", errDoorName, j.Name, wire.Quotable(name))
			}
		} else if err := e.d.names.allow(ctx, name, ""); err != nil {
			return err
		}
	}
	return nil
}

// sameNames insists that a renewal names what the certificate does (4.2.2).
func sameNames(old *x509.Certificate, names []string, addrs []netip.Addr) error {
	have := slices.Clone(old.DNSNames)
	for _, ip := range old.IPAddresses {
		have = append(have, ip.String())
	}
	want := slices.Clone(names)
	for _, a := range addrs {
		want = append(want, a.String())
	}
	slices.Sort(have)
	slices.Sort(want)
	if !slices.Equal(have, want) {
		return fmt.Errorf("%w: the client's certificate is for %v, the request for %v", errDoorName, have, want)
	}
	return nil
}

// readCSR takes a PKCS #10 in base64, as EST has it, in PEM, or in DER.
func readCSR(r io.Reader) (*x509.CertificateRequest, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDoorBody+1))
	if err != nil || len(b) > maxDoorBody {
		return nil, errors.New("the request is too large, or broke off")
	}
	der := b
	if block, _ := pem.Decode(b); block != nil {
		der = block.Bytes
	} else if clean := bytes.Join(bytes.Fields(b), nil); len(clean) > 0 && b[0] != 0x30 {
		if der, err = base64.StdEncoding.DecodeString(string(clean)); err != nil {
			return nil, errors.New("the request is neither base64 nor DER")
		}
	}
	if len(der) > doors.MaxCSR {
		return nil, errors.New("the request is too large")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	return csr, csr.CheckSignature()
}

var (
	oidSignedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidData       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
)

// certsOnly is the degenerate SignedData that carries certificates (RFC 2315,
// 9.1; RFC 8551, 3.8).
func certsOnly(certs []*x509.Certificate) ([]byte, error) {
	var raw []byte
	for _, c := range certs {
		raw = append(raw, c.Raw...)
	}
	type contentInfo struct {
		Type asn1.ObjectIdentifier
	}
	inner, err := asn1.Marshal(struct {
		Version      int
		Digests      []asn1.RawValue `asn1:"set"`
		Content      contentInfo
		Certificates asn1.RawValue
		Signers      []asn1.RawValue `asn1:"set"`
	}{1, []asn1.RawValue{}, contentInfo{oidData}, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: raw}, []asn1.RawValue{}})
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}{oidSignedData, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}})
}

// base64Lines writes base64 in lines of 64, as MIME and old decoders want it.
func base64Lines(b []byte) []byte {
	text := base64.StdEncoding.EncodeToString(b)
	var out bytes.Buffer
	for len(text) > 64 {
		out.WriteString(text[:64] + "\n")
		text = text[64:]
	}
	out.WriteString(text + "\n")
	return out.Bytes()
}
