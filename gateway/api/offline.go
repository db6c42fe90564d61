package api

import (
	"context"

	"sallyport/internal/wire"
)

// ImportRequest carries the file that `sallyport local csr` wrote.
type ImportRequest struct {
	File string `json:"file"`
}

// ExportedRequest is a granted request and the file for its party: chain, trust
// document, revocation set, and where to dial.
type ExportedRequest struct {
	Request Request             `json:"request"`
	Ways    []wire.RCPAddresses `json:"rcps"`
	File    string              `json:"file"`
}

// Pin is what a party pins that makes its request without a join code.
type Pin struct {
	TrustDomain string `json:"trust_domain"`
	Root        string `json:"root"` // fingerprint
}

// Pin returns the root that issues and its trust domain.
func (c *Client) Pin(ctx context.Context) (Pin, error) { return get[Pin](ctx, c, "/ca/pin", nil) }

// ImportRequest queues the request in a file.
func (c *Client) ImportRequest(ctx context.Context, in ImportRequest) (Request, error) {
	return post[Request](ctx, c, "/requests/import", in)
}

// ExportRequest issues the certificate of a granted request. ref is its ID, or
// the name in exactly one.
func (c *Client) ExportRequest(ctx context.Context, ref string) (ExportedRequest, error) {
	return post[ExportedRequest](ctx, c, at("/requests", ref, "export"), nil)
}
