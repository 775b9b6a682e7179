// Package ingotv1 is what flintlock's API has no words for: the services Host,
// beside flintlock's on a microVM host, and Hub, on the network hub.
package ingotv1
