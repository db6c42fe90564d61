package pki

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// fileDoorsState is what a gateway keeps of the doors of its authority, so that
// it starts while the authority is away.
const fileDoorsState = "pki-doors.json"

// remoteDoors are the doors of an authority in another process: their keys are
// there.
type remoteDoors struct {
	c    *Client
	now  atomic.Pointer[doorIssuers]
	lost bool // the last look failed; used by [Client.Run] only
}

// Doors are those of the authority in the other process, which keeps their keys
// too. It waits for an authority that was never asked for them before.
func (c *Client) Doors(ctx context.Context, baseURL string) (*Doors, error) {
	r := &remoteDoors{c: c}
	if err := r.load(); err != nil {
		return nil, fmt.Errorf("doors: %w", err)
	}
	for {
		err := r.refresh(ctx)
		if err == nil {
			break
		}
		if r.now.Load() != nil && ctx.Err() == nil { // as [Connect]: whatever it is, the gateway starts
			c.cfg.Log.WarnContext(ctx, "the certificate authority does not say what the doors issue from; they work with what is known of it, and issue nothing", "error", err)
			break
		}
		if away := (*net.OpError)(nil); !errors.As(err, &away) {
			return nil, fmt.Errorf("doors: certificate authority at %s: %w", c.cfg.Addr, err)
		}
		c.cfg.Log.WarnContext(ctx, "the certificate authority does not answer; the doors cannot be opened without what it says", "error", err, "again_in", connectTick)
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(connectTick):
		}
	}
	d, err := openDoors(r, baseURL)
	if err != nil {
		return nil, fmt.Errorf("doors: %w", err)
	}
	c.doors.Store(r)
	return d, nil
}

func (r *remoteDoors) load() error {
	path := filepath.Join(r.c.cfg.Dir, fileDoorsState)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var a doorsAnswer
	if err = json.Unmarshal(b, &a); err == nil {
		var i *doorIssuers
		if i, err = a.issuers(); err == nil {
			r.now.Store(i)
			return nil
		}
	}
	return fmt.Errorf("%s is damaged: delete it, the authority says it again (%w)", path, err)
}

// refresh asks which issuers there are, and keeps the answer.
func (r *remoteDoors) refresh(ctx context.Context) error {
	a, err := ask[doorsAnswer](ctx, r.c, pathDoors, struct{}{}, maxDoorCSR)
	if err != nil {
		return err
	}
	i, err := a.issuers()
	if err != nil {
		return err
	}
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	path := filepath.Join(r.c.cfg.Dir, fileDoorsState)
	if old, err := os.ReadFile(path); err != nil || !bytes.Equal(old, b) {
		if err := writeFile(r.c.cfg.Dir, fileDoorsState, b, 0o600); err != nil {
			return err
		}
	}
	r.now.Store(i)
	return nil
}

// look is refresh, and says in the log when that begins to fail, and when it is
// over. It does not make the authority one that is away: it issues to parties,
// and may lack an intermediate for other programs only.
func (r *remoteDoors) look(ctx context.Context) {
	err := r.refresh(ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil && !r.lost:
		r.c.cfg.Log.ErrorContext(ctx, "the doors issue nothing: the certificate authority does not say from what", "error", err)
	case err == nil && r.lost:
		r.c.cfg.Log.InfoContext(ctx, "the doors issue again")
	}
	r.lost = err != nil
}

func (r *remoteDoors) trustDomain() string   { return r.c.td }
func (r *remoteDoors) issuers() *doorIssuers { return r.now.Load() }

func (r *remoteDoors) certify(ctx context.Context, req doorRequest) ([]*x509.Certificate, error) {
	a, err := ask[chainAnswer](ctx, r.c, pathDoorLeaf, req, maxDoorCSR)
	if err != nil {
		return nil, err
	}
	chain, err := parseAll(a.Chain)
	if err != nil || len(chain) < 2 {
		return nil, fmt.Errorf("the certificate authority answers with a chain of %d: %w", len(a.Chain), errors.Join(wire.ErrMalformed, err))
	}
	if chain[0].CheckSignatureFrom(r.issuers().doors[0]) != nil { // a rollover was begun elsewhere
		return chain, r.refresh(ctx)
	}
	return chain, nil
}

// SignCRL has a CRL signed by the process that holds the issuer's key.
func (r *remoteDoors) SignCRL(ctx context.Context, issuer wire.KeyHash, crl doors.CRL) ([]byte, error) {
	req := crlRequest{Issuer: issuer, Number: crl.Number.Int64(), This: crl.This, Next: crl.Next, Revoked: entriesOf(crl.Revoked)}
	a, err := ask[derAnswer](ctx, r.c, pathDoorsCRL, req, maxDoorCRL)
	return a.DER, err
}

// ExternalCRL is [Authority.ExternalCRL].
func (c *Client) ExternalCRL(ctx context.Context, issuer wire.KeyHash, revoked []doors.Revoked) (wire.CAStatus, error) {
	return ask[wire.CAStatus](ctx, c, pathExternalCRL, crlRequest{Issuer: issuer, Revoked: entriesOf(revoked)}, maxDoorCRL)
}

// entriesOf is what crlRequest.entries undoes.
func entriesOf(revoked []doors.Revoked) (out []revokedEntry) {
	for _, e := range revoked {
		out = append(out, revokedEntry{doors.Serial(e.Serial), e.At, e.Reason})
	}
	return out
}

// SignOCSP is the same for what is known of one leaf.
func (r *remoteDoors) SignOCSP(ctx context.Context, issuer wire.KeyHash, s doors.Status) ([]byte, error) {
	req := ocspRequest{Issuer: issuer, Serial: doors.Serial(s.Serial), Hash: s.Hash, This: s.This, Next: s.Next, Nonce: s.Nonce}
	if s.Revoked != nil {
		req.Revoked = &revokedEntry{doors.Serial(s.Serial), s.Revoked.At, s.Revoked.Reason}
	}
	a, err := ask[derAnswer](ctx, r.c, pathDoorsOCSP, req, maxSmall)
	return a.DER, err
}
