// Package api holds the protobuf definitions and the Go code made from them:
// flintlock's services and types by their exact names and numbers, and Ingot's
// own in ingot.v1. It holds nothing else.
package api

//go:generate protoc -I . --go_out=. --go_opt=module=ingot/api --go-grpc_out=. --go-grpc_opt=module=ingot/api,require_unimplemented_servers=true types/microvm.proto services/microvm/v1alpha1/microvms.proto services/microvmexec/v1alpha1/microvmexec.proto services/microvmsshproxy/v1alpha1/microvmsshproxy.proto ingot/v1/host.proto ingot/v1/hub.proto
