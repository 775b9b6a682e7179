package rpc

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	"ingot/api/services/microvm/v1alpha1"
)

var update = flag.Bool("update", false, "write docs/openapi.yaml")

const openAPIFile = "../../docs/openapi.yaml"

// texts are what the descriptors of routes do not say.
var texts = map[string]string{
	"CreateMicroVM":      "Record a microVM; it starts in the background",
	"DeleteMicroVM":      "Begin to delete a microVM; it is gone when it is not found any more",
	"GetMicroVM":         "One microVM by its uid; else those of a namespace",
	"ListMicroVMsStream": "The microVMs of a namespace, one a line",
	"ServerInfo":         "Which flintlock this host is as good as, and what else it serves",
}

// TestOpenAPI: docs/openapi.yaml is what the routes and messages are, no more and no
// less: it is made of them (-update), so that it can't be otherwise.
func TestOpenAPI(t *testing.T) {
	head := "# The gateway's routes and messages. `go test ./internal/rpc -run OpenAPI -update` writes it anew.\n"
	body, err := yaml.Marshal(openAPI(t))
	if err != nil {
		t.Fatal(err)
	}
	want := head + string(body)
	if *update {
		if err := os.WriteFile(openAPIFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(openAPIFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/openapi.yaml is old (-update): %s", diff)
	}
}

type object = yaml.MapSlice

func pair(key string, value any) yaml.MapItem { return yaml.MapItem{Key: key, Value: value} }

func ref(m protoreflect.MessageDescriptor) object {
	return object{pair("$ref", "#/components/schemas/"+string(m.Name()))}
}

func openAPI(t *testing.T) object {
	service := v1alpha1.File_services_microvm_v1alpha1_microvms_proto.Services().ByName("MicroVM")
	seen := map[string]protoreflect.MessageDescriptor{}
	paths := map[string]object{}
	for _, r := range routes {
		verb, path, _ := strings.Cut(r.pattern, " ")
		first := service.Methods().ByName(protoreflect.Name(r.methods[0]))
		if first == nil || texts[r.methods[0]] == "" {
			t.Fatalf("%s is of no method that there is", r.pattern)
		}
		var answers []any
		for _, name := range r.methods {
			out := service.Methods().ByName(protoreflect.Name(name)).Output()
			collect(seen, out)
			answers = append(answers, ref(out))
		}
		op := object{pair("operationId", r.methods[0]), pair("summary", texts[r.methods[0]])}
		op = append(op, parameters(path, r.methods)...)
		if verb == "POST" {
			in := first.Input()
			if r.methods[0] == "CreateMicroVM" { // its microvm is the body
				in = in.Fields().ByName("microvm").Message()
			}
			collect(seen, in)
			op = append(op, pair("requestBody", object{pair("required", r.methods[0] == "CreateMicroVM"), content("application/json", ref(in))}))
		}
		var schema any = answers[0]
		if len(answers) > 1 {
			schema = object{pair("oneOf", answers)}
		}
		answer := "The answer"
		if first.IsStreamingServer() {
			answer = "Lines, each like this"
			schema = object{pair("type", "object"), pair("properties", object{pair("result", schema), pair("error", object{pair("$ref", "#/components/schemas/Status")})})}
		}
		op = append(op, pair("responses", object{
			pair("200", object{pair("description", answer), content("application/json", schema)}),
			pair("default", object{pair("description", "What is wrong; the status is the code's, as google.rpc.Code says"), content("application/json", object{pair("$ref", "#/components/schemas/Status")})}),
		}))
		paths[path] = append(paths[path], pair(strings.ToLower(verb), op))
	}
	return object{
		pair("openapi", "3.1.0"),
		pair("info", object{pair("title", "Ingot: flintlock's MicroVM over HTTP"), pair("version", "v1alpha1")}),
		pair("security", []any{object{}, object{pair("bearer", []any{})}}),
		pair("paths", sorted(paths)),
		pair("components", object{
			pair("securitySchemes", object{pair("bearer", object{pair("type", "http"), pair("scheme", "bearer"),
				pair("description", "The host's token; flintlock's `Basic base64(token)` is taken too. Without a token set, none is asked for")})}),
			pair("schemas", schemas(seen)),
		}),
	}
}

func content(kind string, schema any) yaml.MapItem {
	return pair("content", object{pair(kind, object{pair("schema", schema)})})
}

func parameters(path string, methods []string) object {
	var list []any
	if strings.Contains(path, "{name}") {
		list = append(list, object{pair("name", "name"), pair("in", "path"), pair("required", true), pair("schema", object{pair("type", "string")}),
			pair("description", map[bool]string{true: "a uid, or a namespace", false: "a uid"}[slices.Contains(methods, "ListMicroVMs")])})
	}
	if slices.Contains(methods, "ListMicroVMs") {
		// In the query it is the field of the request, beside the path's that is called so here.
		list = append(list, object{pair("name", "name"), pair("in", "query"), pair("schema", object{pair("type", "string")}), pair("description", "of a namespace: only what is called so")})
	}
	if list == nil {
		return nil
	}
	return object{pair("parameters", list)}
}

// collect finds the messages that a message is made of.
func collect(seen map[string]protoreflect.MessageDescriptor, m protoreflect.MessageDescriptor) {
	if m == nil || seen[string(m.Name())] != nil || wellKnown(m) != nil {
		return
	}
	if !m.IsMapEntry() {
		seen[string(m.Name())] = m
	}
	for i := range m.Fields().Len() {
		collect(seen, m.Fields().Get(i).Message())
	}
}

// wellKnown are messages that JSON has a form of its own for.
func wellKnown(m protoreflect.MessageDescriptor) object {
	switch m.FullName() {
	case "google.protobuf.Timestamp":
		return object{pair("type", "string"), pair("format", "date-time")}
	case "google.protobuf.Duration":
		return object{pair("type", "string"), pair("pattern", `^-?[0-9]+(\.[0-9]+)?s$`)}
	}
	return nil
}

func schemas(seen map[string]protoreflect.MessageDescriptor) object {
	all := map[string]object{"Status": {pair("type", "object"), pair("properties", object{
		pair("code", object{pair("type", "integer")}), pair("message", object{pair("type", "string")}), pair("details", object{pair("type", "array"), pair("items", object{pair("type", "object")})}),
	})}}
	for name, m := range seen {
		var properties object
		for i := range m.Fields().Len() {
			properties = append(properties, pair(m.Fields().Get(i).JSONName(), field(m.Fields().Get(i))))
		}
		all[name] = object{pair("type", "object")}
		if len(properties) > 0 {
			all[name] = append(all[name], pair("properties", properties))
		}
	}
	return sorted(all)
}

func sorted(all map[string]object) (list object) {
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, pair(name, all[name]))
	}
	return list
}

func field(f protoreflect.FieldDescriptor) object {
	switch {
	case f.IsMap():
		return object{pair("type", "object"), pair("additionalProperties", value(f.MapValue()))}
	case f.IsList():
		return object{pair("type", "array"), pair("items", value(f))}
	}
	return value(f)
}

func value(f protoreflect.FieldDescriptor) object {
	switch f.Kind() {
	case protoreflect.StringKind:
		return object{pair("type", "string")}
	case protoreflect.BoolKind:
		return object{pair("type", "boolean")}
	case protoreflect.Int32Kind:
		return object{pair("type", "integer"), pair("format", "int32")}
	case protoreflect.Int64Kind: // which JSON has as text
		return object{pair("type", "string"), pair("format", "int64")}
	case protoreflect.EnumKind:
		var names []string
		for i := range f.Enum().Values().Len() {
			names = append(names, string(f.Enum().Values().Get(i).Name()))
		}
		return object{pair("type", "string"), pair("enum", names)}
	case protoreflect.MessageKind:
		if known := wellKnown(f.Message()); known != nil {
			return known
		}
		return ref(f.Message())
	}
	panic(fmt.Sprintf("no message of the gateway's has a %v yet", f.Kind()))
}
