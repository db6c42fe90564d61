package gateway

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"strings"

	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

const (
	doorACME = "acme"
	// sideHere is the name, in the URL, of the side on which the client is.
	sideHere = "here"
)

// errDoorSide says that the challenges of a client cannot be looked at.
var errDoorSide = errors.New("no challenge can be looked at")

// acmeBackend is the gateway as the ACME door sees it.
func (d *doorway) acmeBackend() doors.ACME {
	return doors.ACME{
		Values:  doorValues{d.s.store},
		Side:    d.acmeSide,
		Record:  d.acmeRecord,
		Revoked: d.acmeRevoked,
		Revoke:  d.acmeRevoke,
		Failed:  func(err error) { d.log.Error("ACME client not served", "error", err) },
	}
}

// acmeSide finds the node from which a client's challenges are looked at. At a
// node's proxy it is that node, whatever the client says; elsewhere it is the
// one that the URL names.
func (d *doorway) acmeSide(req *http.Request, name string) (doors.Side, error) {
	ctx := req.Context()
	if req.TLS == nil {
		return doors.Side{}, fmt.Errorf("%w: ACME needs https", errDoorSide)
	}
	var node *store.Node
	var err error
	switch party, proxied := doorPartyFrom(ctx); {
	case proxied && name != sideHere:
		return doors.Side{}, fmt.Errorf("%w: at a proxy the directory is https://%s/acme/%s/directory", errDoorSide, d.s.cfg.DoorsName, sideHere)
	case proxied && party.Role != wire.RoleNode:
		return doors.Side{}, fmt.Errorf("%w at the proxy of an RCP, which dials nobody: use that of a node beside the client", errDoorSide)
	case proxied:
		node, err = d.s.store.Node(ctx, party.ID)
	case name == sideHere:
		return doors.Side{}, fmt.Errorf("%w from here: name the node beside the client, as in /acme/NODE/directory", errDoorSide)
	default:
		node, err = d.namedNode(ctx, name)
	}
	if errors.Is(err, store.ErrNotFound) || err == nil && node.State == wire.StateRevoked {
		return doors.Side{}, fmt.Errorf("%w: no node %q", errDoorSide, wire.Quotable(name))
	}
	if err != nil {
		d.log.Error("ACME client not served", "error", err)
		return doors.Side{}, fmt.Errorf("%w now", errDoorSide)
	}
	id := node.ID
	return doors.Side{
		ID: string(id), Name: name,
		Allow: func(ctx context.Context, host string) error {
			err := d.names.allow(ctx, host, id)
			if errors.Is(err, errDoorName) {
				d.refused(req, doorACME, err)
			}
			return err
		},
		Dial: func(ctx context.Context, kind, host string) (net.Conn, error) {
			return d.s.dialTarget(ctx, id, wire.ChallengeTarget(kind, host))
		},
	}, nil
}

// namedNode finds a node by its whole name or UUID.
func (d *doorway) namedNode(ctx context.Context, name string) (*store.Node, error) {
	if id, err := wire.ParseID(name); err == nil {
		return d.s.store.Node(ctx, id)
	}
	return d.s.store.NodeByName(ctx, store.DefaultTenant, name)
}

func (d *doorway) acmeRecord(ctx context.Context, side doors.Side, leaf *x509.Certificate) error {
	origin := "api"
	if p, ok := doorPartyFrom(ctx); ok {
		origin = "proxy of node " + p.ID.Short()
	}
	ctx = store.WithActor(context.WithoutCancel(ctx), store.Actor{Who: "acme client at " + d.s.fleet.nameNow(wire.ID(side.ID)), Origin: origin})
	return d.record(ctx, doorACME, leaf, side.ID, nil)
}

func (d *doorway) acmeRevoked(ctx context.Context, serial *big.Int) (bool, error) {
	c, err := d.bySerial(ctx, d.s.store.Queries, serial)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	return err == nil && !c.RevokedAt.IsZero(), err
}

// bySerial finds a leaf of the doors, whichever of their issuers signed it.
func (d *doorway) bySerial(ctx context.Context, q store.Queries, serial *big.Int) (*store.Certificate, error) {
	for _, issuer := range d.ca.Doors() {
		c, err := q.Certificate(ctx, wire.KeyOf(issuer), doors.Serial(serial))
		if !errors.Is(err, store.ErrNotFound) {
			return c, err
		}
	}
	return nil, fmt.Errorf("serial number %s: %w", doors.Serial(serial), store.ErrNotFound)
}

// acmeRevoke is for a client that proved that the leaf is its own.
func (d *doorway) acmeRevoke(ctx context.Context, serial *big.Int, reason int) error {
	ctx = store.WithActor(ctx, store.Actor{Who: "acme client"})
	return d.s.store.Update(ctx, func(ctx context.Context, tx *store.Tx) error {
		c, err := d.bySerial(ctx, tx.Queries, serial)
		if err != nil {
			return err
		}
		tx.Audit(ctx, "certificate.revoke", strings.Join(c.Names, " "), "serial "+c.Serial+", asked for by its holder")
		return tx.RevokeCertificate(ctx, c.Issuer, c.Serial, reason)
	})
}
