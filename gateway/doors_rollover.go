package gateway

import (
	"context"
	"fmt"
	"slices"
	"time"

	"sallyport/gateway/api"
	"sallyport/gateway/store"
	"sallyport/internal/doors"
	"sallyport/internal/wire"
)

// doorSelf is the door of the doors' own certificates, which follow by
// themselves.
const doorSelf = "self"

// certificatesBelow lists the certificates of other programs that a root which
// is given up takes along: they are good now, they hang on an intermediate of
// the doors below it, and no newer one that stays has their names.
func (d *doorway) certificatesBelow(ctx context.Context, db *store.DB, given map[wire.KeyHash]bool) ([]*store.Certificate, error) {
	rows, err := db.DoorCertificates(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	stays := map[string]time.Time{} // when the newest certificate for a name was issued that does
	for _, c := range rows {
		if c.RevokedAt.IsZero() && !given[c.Issuer] {
			for _, name := range c.Names {
				if c.IssuedAt.After(stays[name]) {
					stays[name] = c.IssuedAt
				}
			}
		}
	}
	return slices.DeleteFunc(rows, func(c *store.Certificate) bool {
		// After an abort it is the older one that stays: the program has put this one in its place.
		renewed := !slices.ContainsFunc(c.Names, func(name string) bool { return stays[name].Before(c.IssuedAt) })
		return !given[c.Issuer] || c.Door == doorSelf || !c.RevokedAt.IsZero() || renewed
	}), nil
}

// issuersBelow are the doors' intermediates that go with a root.
func (d *doorway) issuersBelow(root wire.KeyHash) map[wire.KeyHash]bool {
	out := map[wire.KeyHash]bool{}
	_, roots := d.ca.Trust()
	for _, r := range roots {
		if wire.KeyOf(r) != root {
			continue
		}
		for _, inter := range d.ca.Doors() {
			if inter.CheckSignatureFrom(r) == nil {
				out[wire.KeyOf(inter)] = true
			}
		}
	}
	return out
}

// tellDoors adds to a change what becomes of the doors' certificates when root,
// in use now, is given up.
func (s *Server) tellDoors(ctx context.Context, c *api.CAChange, root wire.KeyHash, now bool) error {
	if s.doors == nil {
		return nil
	}
	given, stuck := s.doors.issuersBelow(root), false
	issuing := s.doors.ca.Doors()
	if now && len(issuing) > 0 { // one that was imported stays until another is
		stuck = given[wire.KeyOf(issuing[0])]
		delete(given, wire.KeyOf(issuing[0]))
	}
	rows, err := s.doors.certificatesBelow(ctx, s.store, given)
	if err != nil {
		return err
	}
	for _, row := range rows {
		c.Certificates = append(c.Certificates, (&rest{s: s}).certificateView(row))
	}
	switch {
	case len(rows) > 0 && now:
		c.Notes = append(c.Notes, fmt.Sprintf("%d certificates of other programs hang on the root that is given up, and were not renewed: programs that trust the new root only refuse them, OCSP and CRL know them no longer, and they cannot be renewed by simplereenroll", len(rows)))
	case len(rows) > 0:
		c.Notes = append(c.Notes, fmt.Sprintf("%d certificates of other programs hang on the root that is replaced: they have to be renewed before `sallyport ca finish`, which names those that are left", len(rows)))
	}
	if stuck {
		c.Notes = append(c.Notes, fmt.Sprintf("the doors go on to issue from an intermediate below the root that is given up (%s): bring them another (`sallyport ca csr --doors`) if programs are to follow", doors.IssuerName(issuing[0])))
	}
	return nil
}

// someCertificates names the first few.
func someCertificates(list []api.Certificate) string {
	return fewOf(list, func(c api.Certificate) string {
		name := "without a name"
		if len(c.Names) > 0 {
			name = c.Names[0]
		}
		return fmt.Sprintf("%s (%s)", name, c.Door)
	})
}
