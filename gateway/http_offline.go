package gateway

import (
	"context"
	"net/http"

	"github.com/danielgtaylor/huma/v2"

	"sallyport/gateway/api"
	"sallyport/internal/wire"
)

// offlineRoutes are enrolment by files.
func (r *rest) offlineRoutes() {
	in := huma.Operation{OperationID: "request.import", Method: http.MethodPost, Path: "/requests/import", Summary: "Queue a certificate request from a file"}
	in.MaxBodyBytes = 2 * wire.MaxOfflineRequest // JSON of it
	handle(r, in, mayCertify, func(ctx context.Context, in *body[api.ImportRequest]) (*body[api.Request], error) {
		return decided(r.s.enrolment.importRequest(ctx, in.Body))
	})
	pin := huma.Operation{OperationID: "ca.pin", Method: http.MethodGet, Path: "/ca/pin", Summary: "Show the root that a party without a join code pins"}
	handle(r, pin, mayRead, func(context.Context, *struct{}) (*body[api.Pin], error) {
		return answer(r.s.pin()), nil
	})
	out := huma.Operation{OperationID: "request.export", Method: http.MethodPost, Path: "/requests/{ref}/export", Summary: "Issue the certificate of a granted request, for a file"}
	handle(r, out, mayCertify, func(ctx context.Context, in *ByRef) (*body[api.ExportedRequest], error) {
		x, err := r.s.enrolment.exportRequest(ctx, in.Ref)
		return answer(x), err
	})
}
