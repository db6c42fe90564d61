package gateway

import (
	"context"
	"crypto/x509"
	"fmt"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/identity"
	"sallyport/internal/wire"
)

// issued is a party's leaf as the certificate authority made it.
type issued struct {
	chain  [][]byte // leaf first
	leaf   *x509.Certificate
	key    wire.KeyHash
	issuer wire.KeyHash // an intermediate's; empty if no intermediate of ours issued it
}

// notIssued is why the certificate authority did not issue what it was asked for:
// operators are told, since it may be an external CA that refuses.
type notIssued struct{ error }

func (e *notIssued) Unwrap() error { return e.error }

func readIssued(chain [][]byte) (*issued, error) {
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, fmt.Errorf("own certificate authority: %w", err)
	}
	c := &issued{chain: chain, leaf: leaf, key: wire.KeyOf(leaf)}
	if len(chain) > 1 {
		issuer, err := x509.ParseCertificate(chain[1])
		if err != nil {
			return nil, fmt.Errorf("own certificate authority: %w", err)
		}
		c.issuer = wire.KeyOf(issuer)
	}
	return c, nil
}

// issue has a party's leaf made, and writes its serial number down before the
// leaf can leave our hands: one whose party took it while we fell would stand in
// no CRL.
func (e *enrolment) issue(ctx context.Context, r wire.IssueRequest) (*issued, error) {
	chain, err := e.ca.Issue(ctx, r)
	if away(err) {
		err = fmt.Errorf("%w: %w", errAway, err)
	}
	if err != nil {
		return nil, &notIssued{err}
	}
	return noted(ctx, e.store, chain, r.Party)
}

// noted writes down the serial number of a leaf that was made a moment ago: CRLs
// and OCSP know leaves by nothing else.
func noted(ctx context.Context, db *store.DB, chain [][]byte, party wire.Party) (*issued, error) {
	c, err := readIssued(chain)
	if err != nil || c.issuer == "" {
		return c, err
	}
	row := &store.Certificate{Issuer: c.issuer, Serial: doors.Serial(c.leaf.SerialNumber), KeyHash: c.key, Names: c.leaf.DNSNames, Via: string(party.ID), NotAfter: c.leaf.NotAfter}
	return c, db.Update(ctx, func(ctx context.Context, tx *store.Tx) error { return tx.AddCertificate(ctx, row) })
}

// record notes a leaf that its party has.
func (c *issued) record(ctx context.Context, tx *store.Tx, party wire.Party, name, tenant string) error {
	err := tx.PutKey(ctx, &store.Key{KeyHash: c.key, Role: party.Role, PartyID: party.ID, Name: name, Tenant: tenant, IssuedAt: tx.Now(), NotAfter: c.leaf.NotAfter})
	if err != nil {
		return err
	}
	if c.issuer != "" {
		if err := tx.SetIssuer(ctx, party, c.issuer); err != nil {
			return err
		}
	}
	if party.Role == wire.RoleRCP {
		return tx.SetRCPCertificate(ctx, name, c.key, c.leaf.NotAfter, identity.RenewAfter(c.leaf))
	}
	return tx.SetNodeCertificate(ctx, party.ID, c.key, c.leaf.NotAfter, identity.RenewAfter(c.leaf))
}
