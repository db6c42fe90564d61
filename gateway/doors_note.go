package gateway

import (
	"context"
	"crypto/x509"
	"fmt"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// noteLeaf writes down the serial number of a party's leaf: CRLs and OCSP know
// leaves by nothing else.
func noteLeaf(ctx context.Context, tx *store.Tx, leaf *x509.Certificate, chain [][]byte, party wire.Party) error {
	if len(chain) < 2 {
		return nil // whoever issued it, it was not an intermediate of ours
	}
	issuer, err := x509.ParseCertificate(chain[1])
	if err != nil {
		return fmt.Errorf("own certificate authority: %w", err)
	}
	return tx.AddCertificate(ctx, &store.Certificate{Issuer: wire.KeyOf(issuer), Serial: doors.Serial(leaf.SerialNumber), KeyHash: wire.KeyOf(leaf),
		Names: leaf.DNSNames, Via: string(party.ID), NotAfter: leaf.NotAfter})
}

// issue has a party's leaf made, and writes its serial number down before the
// leaf can leave our hands: one whose party took it while we fell would stand in
// no CRL.
func (e *enrolment) issue(ctx context.Context, r wire.IssueRequest) ([][]byte, error) {
	chain, err := e.ca.Issue(ctx, r)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("own certificate authority: %w", err)
	}
	return chain, e.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return noteLeaf(ctx, tx, leaf, chain, r.Party) })
}

// noteOwnLeaf is noteLeaf for the gateway's own.
func (s *Server) noteOwnLeaf(ctx context.Context, chain [][]byte) error {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return fmt.Errorf("own certificate authority: %w", err)
	}
	return s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		return noteLeaf(ctx, tx, leaf, chain, s.party(wire.RoleGateway, s.id.ID()))
	})
}
